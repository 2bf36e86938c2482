"""The text of a calibration: files as documents, windows evenly spaced, and the text that comes with the program."""

from __future__ import annotations

import json

import pytest

from mlx_gptoss.api import NANO
from mlx_gptoss.calibration.text import DEFAULT_TEXT, read_text
from mlx_gptoss.errors import InvalidRequest
from mlx_gptoss.tokenizer import Tokenizer


@pytest.fixture(scope="module")
def tokenizer():
    return Tokenizer.from_folder(NANO)


def test_documents_of_a_text_file(tmp_path, tokenizer):
    (tmp_path / "a.txt").write_text("one<|endoftext|>\n<|start|>user<|message|>two<|end|><|endoftext|>three")
    found = read_text(tmp_path / "a.txt", tokenizer)
    assert [tokenizer.decode(window, specials=True) for window in found.windows] == [
        "one", "<|start|>user<|message|>two<|end|>", "three"
    ]  # fmt: skip
    assert found.windows[1][0] == tokenizer.special("<|start|>")


def test_lines_of_a_jsonl_file(tmp_path, tokenizer):
    messages = [{"role": "user", "content": "Hi <|end|>"}, {"role": "assistant", "content": "Hello"}]
    lines = [json.dumps({"text": "prose"}), "", json.dumps({"messages": messages})]
    (tmp_path / "a.jsonl").write_text("\n".join(lines))
    first, second = read_text(tmp_path / "a.jsonl", tokenizer).windows
    assert tokenizer.decode(first) == "prose"
    text = tokenizer.decode(second, specials=True)
    assert text.startswith("<|start|>system<|message|>You are ChatGPT")
    assert text.endswith("<|start|>assistant<|channel|>final<|message|>Hello<|return|>")
    assert second.count(tokenizer.special("<|end|>")) == 2  # of two messages: a user cannot write one


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.jsonl", '{"text": "a"}\n{"txt": "b"}', 'line 2 of a.jsonl is not a document, {"text": "..."}'),
        ("a.jsonl", "no", "line 1 of a.jsonl is not a document"),
        ("a.jsonl", '{"text": 3}', "its text is not a string"),
        ("a.jsonl", '{"messages": []}', "messages must be a non-empty list"),
        ("a.txt", "", "has no text to calibrate on"),
        ("missing.txt", None, "missing.txt cannot be read"),
    ],
)
def test_files_that_are_no_text(tmp_path, tokenizer, name, content, message):
    if content is not None:
        (tmp_path / name).write_text(content)
    with pytest.raises(InvalidRequest, match=message):
        read_text(tmp_path / name, tokenizer)


def test_windows_of_a_long_text_are_evenly_spaced(tmp_path, tokenizer):
    documents = [f"{number} long " * 100 if number % 5 == 0 else f"short {number} " * 10 for number in range(100)]
    (tmp_path / "a.txt").write_text("<|endoftext|>".join(documents))
    whole = read_text(tmp_path / "a.txt", tokenizer, window=400)
    assert max(whole.lengths) == 400
    some = read_text(tmp_path / "a.txt", tokenizer, max_tokens=whole.tokens // 4, window=400)
    assert some.tokens == whole.tokens // 4
    places = [whole.windows.index(window) for window in some.windows[:-1]]
    assert places == sorted(places) and places[-1] > 0.9 * len(whole.windows)
    long = sum(length == 400 for length in some.lengths) / len(some.windows)
    assert long == pytest.approx(sum(length == 400 for length in whole.lengths) / len(whole.windows), abs=0.2)
    assert some.digest != whole.digest


def test_the_default_text(tokenizer):
    text = DEFAULT_TEXT.read_text("utf-8")
    assert len(text.encode()) <= 300_000
    for kind in ("<|channel|>analysis", "<|call|>", "remainder", "```python", "from __future__ import", "\n## "):
        assert kind in text
    found = read_text(None, tokenizer)
    assert 60_000 < found.tokens <= 65_536
