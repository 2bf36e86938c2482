"""Write the text that `convert --calibrate` uses by default: Harmony conversations, prose, code and arithmetic.

    python examples/tools/calibration_text.py > mlx_gptoss/calibration/text.txt

The conversations are the bundled model's tasks on the side of the split that it was trained on, and questions about
this repository's modules, answered by their docstrings. Prose is this repository's guides, code its modules. No file of
another author is used. `<|endoftext|>` ends a document.
"""

from __future__ import annotations

import ast
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from random import Random
from tempfile import TemporaryDirectory

import nano_tasks as tasks
from nano_tokenizer import write_tokenizer

from mlx_gptoss.harmony.messages import Conversation, Message
from mlx_gptoss.harmony.render import render
from mlx_gptoss.tokenizer import ENDOFTEXT, Tokenizer

ROOT = Path(__file__).parents[2]
SEED = 21
BYTES = {"tasks": 150_000, "questions": 40_000, "prose": 45_000, "code": 45_000, "arithmetic": 15_000}
PASSAGE = 6000  # bytes of a document of prose or code, at most
SPECIAL = re.compile(r"<\|\w+\|>")  # a file about special tokens would be encoded with them


def task_documents(r: Random, tokenizer: Tokenizer) -> Iterator[str]:
    """Conversations of the bundled model's training mix, with the right answer."""
    while True:
        example = tasks.draw(r)
        yield tokenizer.decode(render(example.conversation, tokenizer), specials=True) + example.turn.text()


def question_documents(r: Random, tokenizer: Tokenizer) -> Iterator[str]:
    """A module without its docstring and a question about it; the docstring is the answer."""
    for path in modules(r):
        source = path.read_text("utf-8")
        tree = ast.parse(source)
        about = ast.get_docstring(tree)
        if about is None or len(about) < 200:
            continue
        code = source.split('"""', 2)[2].strip()[:2500].rsplit("\n", 1)[0]
        question = r.choice(("What does this module do?", "Describe this Python file.", "Explain the code below."))
        conversation = Conversation((Message("user", f"{question}\n\n```python\n{code}\n```"),), date=tasks.date(r))
        prompt = tokenizer.decode(render(conversation, tokenizer), specials=True)
        names = [node.name for node in tree.body if isinstance(node, (ast.FunctionDef, ast.ClassDef))][:6]
        thought = f"The file defines {', '.join(names) or 'a few constants'}. The user wants a short description."
        yield (
            f"{prompt}<|channel|>analysis<|message|>{thought}<|end|>"
            f"<|start|>assistant<|channel|>final<|message|>{about}<|return|>"
        )


def prose_documents(r: Random, tokenizer: Tokenizer) -> Iterator[str]:
    """Sections of the guides."""
    paths = sorted(path for path in ROOT.glob("**/*.md") if "node_modules" not in path.parts)
    sections = [part for path in paths for part in re.split(r"\n(?=## )", path.read_text("utf-8")) if len(part) > 800]
    r.shuffle(sections)
    yield from (section[:PASSAGE] for section in sections if not SPECIAL.search(section))


def code_documents(r: Random, tokenizer: Tokenizer) -> Iterator[str]:
    yield from (path.read_text("utf-8")[:PASSAGE] for path in modules(r))


def arithmetic_documents(r: Random, tokenizer: Tokenizer) -> Iterator[str]:
    """Worked problems, a dozen lines each."""
    while True:
        yield "\n".join(problem(r) for _ in range(12))


def problem(r: Random) -> str:
    """One line with its working: a product by parts, a division with remainder, a percentage, a sum or a sequence."""
    a, b = r.randint(12, 999), r.randint(3, 99)
    tens, ones = b - b % 10, b % 10
    kind = r.randrange(5)
    if kind == 0:
        return f"{a} * {b} = {a} * {tens} + {a} * {ones} = {a * tens} + {a * ones} = {a * b}"
    if kind == 1:
        return f"{a} / {b} = {a // b} remainder {a % b}, because {b} * {a // b} = {b * (a // b)}"
    if kind == 2:
        return f"{b}% of {a} is {a} * {b} / 100 = {a * b / 100:g}"
    if kind == 3:
        c = r.randint(100, 9999)
        return f"{a} + {b} - {c} = {a + b} - {c} = {a + b - c}"
    return f"{b}, " + ", ".join(str(b + a * n) for n in range(1, 6)) + f": each number is {a} more than the one before."


def modules(r: Random) -> list[Path]:
    paths = sorted(path for folder in ("mlx_gptoss", "cli", "examples") for path in (ROOT / folder).rglob("*.py"))
    r.shuffle(paths)
    return [path for path in paths if not SPECIAL.search(path.read_text("utf-8"))]


def calibration_text() -> str:
    """All documents, in an order that mixes the kinds."""
    with TemporaryDirectory() as folder:
        write_tokenizer(Path(folder))
        tokenizer = Tokenizer.from_folder(folder)
    sources = {
        "tasks": task_documents,
        "questions": question_documents,
        "prose": prose_documents,
        "code": code_documents,
        "arithmetic": arithmetic_documents,
    }
    documents = []
    for kind, make in sources.items():
        size = 0
        for document in make(Random(f"{kind} {SEED}"), tokenizer):
            size += len(document.encode()) + len(ENDOFTEXT) + 1
            if size > BYTES[kind]:
                break
            documents.append(document)
    Random(SEED).shuffle(documents)
    return "".join(f"{document}{ENDOFTEXT}\n" for document in documents)


if __name__ == "__main__":
    sys.stdout.buffer.write(calibration_text().encode())
