"""Write the text that `mlx-gptoss eval` uses by default: conversations that the bundled model's training never saw.

python examples/tools/nano_eval_text.py > mlx_gptoss/nano/eval.txt
"""

from __future__ import annotations

import sys
from pathlib import Path
from tempfile import TemporaryDirectory

import nano_tasks as tasks
from nano_tokenizer import write_tokenizer

from mlx_gptoss.harmony.render import render
from mlx_gptoss.tokenizer import ENDOFTEXT, Tokenizer

PER_KIND, SEED = 20, 1  # measure_nano.py asks the questions of seed 0
KINDS = [kind for kind in tasks.MIX if kind != "json sum"]  # a mask constrains JSON, so its likelihood says less


def eval_text() -> str:
    """The conversations, each as the runtime renders it, with its right answer, `<|endoftext|>` and a line break."""
    with TemporaryDirectory() as folder:
        write_tokenizer(Path(folder))
        tokenizer = Tokenizer.from_folder(folder)
    out = []
    for example in tasks.held_out(PER_KIND, SEED, KINDS):
        prompt = tokenizer.decode(render(example.conversation, tokenizer), specials=True)
        out.append(f"{prompt}{example.turn.text()}{ENDOFTEXT}\n")
    return "".join(out)


if __name__ == "__main__":
    sys.stdout.buffer.write(eval_text().encode())
