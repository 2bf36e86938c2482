"""The JSON files next to the weights come from anywhere: size, links, nesting, types and time are bounded."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import mlx_gptoss
from mlx_gptoss.errors import CheckpointError
from mlx_gptoss.untrusted import tokenizer_file
from mlx_gptoss.weights import checkpoint

SEQUENCE = {"Sequence": {"id": "A", "type_id": 0}}
BACKTRACKS = r"(?:a+)+$"
MAX_S = 20.0  # far more than any of these takes: what is not bounded takes hours, or the memory of the machine


def opened(folder: Path) -> Any:
    """Everything that loading a model reads of the JSON files."""
    found = checkpoint.open(folder)
    return mlx_gptoss.sampling.default_sampling(found.generation_config), found.tokenizer()


def expect_refusal(folder: Path, message: str) -> None:
    started = time.process_time()
    with pytest.raises(CheckpointError, match=message) as caught:
        opened(folder)
    assert time.process_time() - started < MAX_S
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 600


def sparse(path: Path, size: int) -> None:
    path.unlink()
    path.touch()
    os.truncate(path, size)


def pipe(path: Path) -> None:
    path.unlink()
    os.mkfifo(path)


def directory(path: Path) -> None:
    path.unlink()
    path.mkdir()


def link(target: str) -> Callable[[Path], None]:
    def apply(path: Path) -> None:
        path.unlink()
        path.symlink_to(target)

    return apply


def content(data: bytes) -> Callable[[Path], None]:
    def apply(path: Path) -> None:
        path.unlink()
        path.write_bytes(data)

    return apply


FILES: dict[str, tuple[Callable[[Path], Any], str]] = {
    "100 MB": (lambda path: sparse(path, 100 * 2**20), "more than the .* of any checkpoint"),
    "a pipe": (pipe, "not a file of its folder"),
    "a folder": (directory, "not a file of its folder"),
    "a link out of the folder": (link("/etc/passwd"), "not a file of its folder"),
    "a link to a device": (link("/dev/zero"), "not a file of its folder"),
    "a link to itself": (lambda path: link(path.name)(path), "lacks|not a file"),
    "a dangling link": (link("nowhere"), "lacks"),
    "nesting": (content(b"[" * 10**5), "not valid JSON"),
    "nested objects": (content(b'{"a":' * 10**5 + b"1" + b"}" * 10**5), "not valid JSON"),
    "commas": (content(b"[" + b"1," * 5 * 10**6 + b"1]"), "more items"),
    "a number of a million digits": (content(b'{"a": ' + b"1" * 10**6 + b"}"), "not valid JSON"),
    "a key twice": (content(b'{"a": 1, "a": 2}'), "'a' twice"),
    "a long key twice": (content(b'{"%s": 1, "%s": 2}' % (b"x" * 10**6, b"x" * 10**6)), "twice"),
    "not UTF-8": (content(b"\xff\xfe{}"), "not UTF-8"),
    "a list": (content(b"[]"), "not (a JSON|an) object"),
    "a string": (content(b'"a"'), "not (a JSON|an) object"),
    "null": (content(b"null"), "not (a JSON|an) object"),
    "nothing": (content(b""), "not valid JSON"),
}


@pytest.mark.parametrize("damage", FILES)
@pytest.mark.parametrize("name", ["tokenizer.json", "generation_config.json"])
def test_files_that_are_not_read(copied, name, damage):
    folder = copied("nvfp4")
    apply, message = FILES[damage]
    apply(folder / name)
    expect_refusal(folder, message)


def test_a_hub_cache_is_read_through_its_links(copied, tmp_path):
    source, hub = copied("nvfp4"), tmp_path / "hub"
    (hub / "blobs").mkdir(parents=True)
    (hub / "snapshots" / "main").mkdir(parents=True)
    for file in source.iterdir():
        (hub / "blobs" / file.name).write_bytes(file.read_bytes())
        (hub / "snapshots" / "main" / file.name).symlink_to(f"../../blobs/{file.name}")
    assert opened(hub / "snapshots" / "main")[1].encode("a")


GENERATION = {
    "eos_token_id": ["x", 1.5, -1, 2**40, True, [[1]], {"a": 1}, ["1"], [None]],
    "temperature": ["hot", -1, 1e308, [1], {}, True],
    "top_k": [1.5, -1, "5", [], True],
    "top_p": [0, 2, "x", {}],
    "min_p": [1, "x"],
    "repetition_penalty": [0, 100, []],
}


@pytest.mark.parametrize(("name", "value"), [(name, value) for name in GENERATION for value in GENERATION[name]])
def test_generation_config_of_wrong_types(copied, name, value):
    folder = copied("nvfp4")
    (folder / "generation_config.json").write_text(json.dumps({name: value}))
    expect_refusal(folder, name)


def at(*path: Any) -> Callable[[Any], Callable[[dict[str, Any]], None]]:
    """at("a", 0)(value) sets data["a"][0]."""

    def with_value(value: Any) -> Callable[[dict[str, Any]], None]:
        def apply(data: Any) -> None:
            for key in path[:-1]:
                data = data[key]
            data[path[-1]] = value

        return apply

    return with_value


def more_tokens(**tokens: Any) -> Callable[[dict[str, Any]], None]:
    return lambda data: data["model"]["vocab"].update(tokens)


def added(**changes: Any) -> Callable[[dict[str, Any]], None]:
    return lambda data: data["added_tokens"].append({**data["added_tokens"][0], **changes})


def split(pattern: Any) -> Callable[[dict[str, Any]], None]:
    return at("pre_tokenizer", "pretokenizers", 0, "pattern")(pattern)


def nested(levels: int) -> dict[str, Any]:
    part: dict[str, Any] = {"type": "ByteLevel"}
    for _ in range(levels):
        part = {"type": "Sequence", "pretokenizers": [part]}
    return part


TOKENIZERS: dict[str, tuple[Callable[[dict[str, Any]], None], str]] = {
    "a pattern that backtracks": (split({"Regex": BACKTRACKS}), "pattern of its own"),
    "a pattern with a group in a group": (split({"Regex": "(?:(?:a|a)|b)(?:c|c)(?:d|d)"}), "pattern of its own"),
    "a known pattern and more": (split({"Regex": r"\s+|(?:x+x+)+y"}), "pattern of its own"),
    "a long pattern": (split({"Regex": "a|" * 10**6}), "one short pattern"),
    "two patterns": (split({"Regex": "a", "String": "b"}), "one short pattern"),
    "a pattern of another type": (split({"Regex": 3}), "one short pattern"),
    "no pattern": (split(None), "one short pattern"),
    "a backtracking decoder": (
        at("decoder")({"type": "Replace", "pattern": {"Regex": BACKTRACKS}, "content": ""}),
        "byte-level",
    ),
    "a backtracking normalizer": (
        at("normalizer")({"type": "Replace", "pattern": {"Regex": BACKTRACKS}, "content": ""}),
        "normalizer",
    ),
    "nested pre-tokenizers": (at("pre_tokenizer")(nested(60)), "byte-level"),
    "many pre-tokenizers": (
        at("pre_tokenizer")({"type": "Sequence", "pretokenizers": [nested(0)] * 10**5}),
        "short list",
    ),
    "untagged pre-tokenizers": (at("pre_tokenizer")({"pretokenizers": [nested(0)]}), "byte-level"),
    "pre-tokenizers of wrong types": (at("pre_tokenizer")({"type": "Sequence", "pretokenizers": [1]}), "not an object"),
    "a list as a pre-tokenizer": (at("pre_tokenizer")([]), "not an object"),
    "another pre-tokenizer": (at("pre_tokenizer")({"type": "Metaspace"}), "byte-level"),
    "a huge post-processor": (
        at("post_processor")({"type": "TemplateProcessing", "single": [{"Sequence": {"id": "A"}}] * 10**5}),
        "large post_processor",
    ),
    "nested post-processors": (
        at("post_processor")({"type": "Sequence", "processors": [{"type": "Sequence", "processors": []}]}),
        "byte-level",
    ),
    "a huge truncation": (at("truncation")({"direction": "x" * 10**6}), "large truncation"),
    "a padding of another type": (at("padding")([1]), "large padding"),
    "a negative id": (more_tokens(zz=-1), "token id -1"),
    "an id twice": (more_tokens(zz=5), "two tokens with one id"),
    "a huge id": (more_tokens(zz=2**31), "token id 2147483648"),
    "an id of many digits": (more_tokens(zz=10**400), "token id 1000"),
    "an id that is a float": (more_tokens(zz=1.5), "token id 1.5"),
    "an id that is true": (more_tokens(zz=True), "token id True"),
    "an id that is a text": (more_tokens(zz="1"), "token id '1'"),
    "a long token": (more_tokens(**{"z" * 10**6: 9999}), "token of 1000000 characters"),
    "an empty vocabulary": (at("model", "vocab")({}), "no vocabulary"),
    "a list as a vocabulary": (at("model", "vocab")([1]), "no vocabulary"),
    "merges of unknown tokens": (at("model", "merges")([["nowhere", "known"]]), "cannot read the tokenizer"),
    "merges that explode": (at("model", "merges")([["a" * 10**6, "b"]]), "pairs of tokens"),
    "merges of three": (at("model", "merges")([["a", "b", "c"]]), "pairs of tokens"),
    "merges of numbers": (at("model", "merges")([[1, 2]]), "pairs of tokens"),
    "merges as one text": (at("model", "merges")("a b"), "pairs of tokens"),
    "another model": (at("model", "type")("Unigram"), "byte-level"),
    "a model that is a list": (at("model")([]), "byte-level"),
    "random merges": (at("model", "dropout")(0.5), "dropout"),
    "an added id that a letter has": (added(id=5, content="<|x|>"), "two tokens with the id 5"),
    "an added token with a second id": (added(id=9999), "two tokens with the id 9999"),
    "a huge added id": (added(id=2**32 - 1, content="<|x|>"), "added token id 4294967295"),
    "a negative added id": (added(id=-1, content="<|x|>"), "added token id -1"),
    "an added token without text": (added(id=9999, content=""), "without a short content"),
    "a long added token": (added(id=9999, content="x" * 10**6), "without a short content"),
    "added tokens of wrong types": (at("added_tokens")([1]), "malformed added_tokens"),
    "added tokens that are an object": (at("added_tokens")({"a": 1}), "malformed added_tokens"),
    "many added tokens": (
        lambda data: data["added_tokens"].extend(
            {**data["added_tokens"][0], "id": 1000 + n, "content": f"{n:01000}"} for n in range(300)
        ),
        "more than 262144 characters",
    ),
}


@pytest.mark.parametrize("damage", TOKENIZERS)
def test_tokenizers_that_the_library_does_not_see(copied, damage):
    folder = copied("nvfp4")
    data = json.loads((folder / "tokenizer.json").read_text())
    apply, message = TOKENIZERS[damage]
    apply(data)
    (folder / "tokenizer.json").write_text(json.dumps(data))
    expect_refusal(folder, message)


@pytest.mark.parametrize(
    "change",
    [
        at("padding")({"strategy": {"Fixed": 10**6}, "direction": "Right", "pad_to_multiple_of": None, "pad_id": 0,
                       "pad_type_id": 0, "pad_token": "!"}),
        at("truncation")({"direction": "Right", "max_length": 2, "strategy": "LongestFirst", "stride": 0}),
        at("post_processor")({"type": "TemplateProcessing", "single": [SEQUENCE] * 3, "special_tokens": {},
                              "pair": [SEQUENCE, {"Sequence": {"id": "B", "type_id": 1}}]}),
        split({"String": " "}),
        split({"Regex": "|".join(reversed(tokenizer_file.SPLIT_PATTERNS[2:]))}),
    ],
    ids=["padding", "truncation", "template", "a text as the pattern", "known patterns in another order"],
)  # fmt: skip
def test_what_multiplies_or_cuts_text_has_no_effect(copied, change):
    folder = copied("nvfp4")
    data = json.loads((folder / "tokenizer.json").read_text())
    change(data)
    (folder / "tokenizer.json").write_text(json.dumps(data))
    tokenizer = checkpoint.open(folder).tokenizer()
    text = "What is 12 + 30? " * 10
    assert tokenizer.decode(tokenizer.encode(text)) == text


def test_ids_may_have_gaps(copied):
    folder = copied("nvfp4")
    data = json.loads((folder / "tokenizer.json").read_text())
    more_tokens(zz=5000)(data)
    (folder / "tokenizer.json").write_text(json.dumps(data))
    tokenizer = checkpoint.open(folder).tokenizer()
    assert tokenizer.vocab_size == 5001 and tokenizer.decode([5000]) == "zz"


def test_the_largest_file_is_checked_in_bounded_time(tmp_path):
    """A file at the limits: what it takes to refuse it, or to read it, is seconds."""
    vocabulary = {f"{n:044d}": n for n in range(10**6)}
    data = json.dumps({"model": {"type": "BPE", "vocab": vocabulary, "merges": []}}).encode()
    data += b" " * (tokenizer_file.MAX_BYTES - len(data))
    started = time.process_time()
    with pytest.raises(CheckpointError, match="byte-level"):
        tokenizer_file.check(data, "large")
    assert time.process_time() - started < MAX_S
