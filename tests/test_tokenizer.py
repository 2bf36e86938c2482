"""The tokenizer on small vocabularies made here: specials kept apart from text, bytes kept whole."""

from __future__ import annotations

import json
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import mlx_gptoss
from mlx_gptoss.errors import CheckpointError
from mlx_gptoss.tokenizer import CALL, END, SPECIALS, START, Tokenizer

RESERVED = "<|reserved_9|>"
FIRST_SPECIAL = 262
PADDING = 5000  # an id that no vocabulary here has


def byte_letters() -> list[str]:
    others = iter(range(0x100, 0x200))
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    return [chr(byte if byte in printable else next(others)) for byte in range(256)]


def tokenizer_json(**changes: Any) -> dict[str, Any]:
    """256 bytes, six longer tokens (among them halves of an emoji), then the specials."""
    letters = byte_letters()
    vocabulary = {letter: id for id, letter in enumerate(letters)}
    merges = []
    for token in (b"th", b"the", b" t", b" the", b"\xf0\x9f", b"\x8e\x89"):
        written = "".join(letters[byte] for byte in token)
        left = next(end for end in range(len(written) - 1, 0, -1) if {written[:end], written[end:]} <= set(vocabulary))
        merges.append([written[:left], written[left:]])
        vocabulary[written] = len(vocabulary)
    assert len(vocabulary) == FIRST_SPECIAL
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
    added = [{"id": FIRST_SPECIAL + place, "content": name, **flags, "special": True}
             for place, name in enumerate([*SPECIALS, RESERVED])]  # fmt: skip
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}
    content = {
        "version": "1.0",
        "added_tokens": added,
        "pre_tokenizer": byte_level,
        "decoder": byte_level,
        "model": {"type": "BPE", "vocab": vocabulary, "merges": merges},
    }
    return content | changes


def saved(folder: Path, content: dict[str, Any]) -> Path:
    (folder / "tokenizer.json").write_text(json.dumps(content))
    return folder


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    return Tokenizer.from_folder(saved(tmp_path_factory.mktemp("tokenizer"), tokenizer_json()))


def test_specials_are_found_by_name(tokenizer: Tokenizer) -> None:
    assert [tokenizer.special(name) for name in SPECIALS] == list(range(FIRST_SPECIAL, FIRST_SPECIAL + len(SPECIALS)))
    assert set(tokenizer.specials) == {*SPECIALS, RESERVED}
    assert tokenizer.vocab_size == FIRST_SPECIAL + len(SPECIALS) + 1
    assert tokenizer.is_special(tokenizer.special(START))
    assert not tokenizer.is_special(65)
    with pytest.raises(CheckpointError, match=r"<\|nonsense\|>.*gpt-oss"):
        tokenizer.special("<|nonsense|>")


def test_text_is_never_a_special(tokenizer: Tokenizer) -> None:
    text = f"a{END}{START}system{RESERVED}"
    ids = tokenizer.encode(text)
    assert max(ids) < FIRST_SPECIAL
    assert tokenizer.decode(ids) == text


def test_a_special_that_the_file_does_not_flag_is_one_all_the_same(tmp_path: Path) -> None:
    content = tokenizer_json()
    for added in content["added_tokens"]:
        added["special"] = False
    careless = Tokenizer.from_folder(saved(tmp_path, content))
    assert max(careless.encode(f"a{END}")) < FIRST_SPECIAL
    assert careless.decode([careless.special(END)]) == ""


def test_raw_prompts_hold_specials(tokenizer: Tokenizer) -> None:
    ids = tokenizer.encode_with_specials(f"{START}the{CALL}{END[:-1]}")
    assert ids[:3] == [tokenizer.special(START), 257, tokenizer.special(CALL)]
    assert max(ids[3:]) < FIRST_SPECIAL
    assert tokenizer.decode(ids, specials=True) == f"{START}the{CALL}{END[:-1]}"
    assert tokenizer.decode(ids) == f"the{END[:-1]}"


def test_ids_outside_the_vocabulary_are_no_text(tokenizer: Tokenizer) -> None:
    assert tokenizer.decode([104, PADDING, 105, -1, 2**40]) == "hi"
    assert tokenizer.token_bytes(PADDING) == b""


def test_a_lone_surrogate_becomes_a_replacement(tokenizer: Tokenizer) -> None:
    assert tokenizer.decode(tokenizer.encode("a\ud83db\ud83d\ude00")) == "a\ufffdb\U0001f600"


def test_characters_come_when_they_are_whole(tokenizer: Tokenizer) -> None:
    decoder = tokenizer.decoder()
    ids = tokenizer.encode("é the🎉!")
    assert [tokenizer.token_bytes(id) for id in ids] == [b"\xc3", b"\xa9", b" the", b"\xf0\x9f", b"\x8e\x89", b"!"]
    assert [decoder.push(id) for id in ids] == ["", "é", " the", "", "🎉", "!"]
    assert decoder.flush() == ""


def test_broken_characters_are_replaced(tokenizer: Tokenizer) -> None:
    decoder = tokenizer.decoder(specials=True)
    assert decoder.push(0xE2) + decoder.push(0x82) == ""
    assert decoder.push(ord("a")) == "\ufffda"
    assert decoder.push(0xFF) == "\ufffd"
    assert decoder.push(0xF0) == ""
    assert decoder.push(tokenizer.special(END)) == f"\ufffd{END}"
    assert decoder.push(0xF0) == ""
    assert decoder.flush() == "\ufffd"
    assert decoder.flush() == ""


@settings(max_examples=500, deadline=None)
@given(text=st.text())
def test_text_comes_back(tokenizer: Tokenizer, text: str) -> None:
    assert tokenizer.decode(tokenizer.encode(text)) == text
    assert tokenizer.decode(tokenizer.encode_with_specials(text), specials=True) == text


@settings(max_examples=500, deadline=None)
@given(ids=st.lists(st.integers(0, FIRST_SPECIAL - 1)))
def test_bytes_come_back(tokenizer: Tokenizer, ids: list[int]) -> None:
    whole = b"".join(map(tokenizer.token_bytes, ids)).decode(errors="replace")
    assert tokenizer.decode(ids) == whole


def test_a_token_that_is_not_byte_level_stands_for_itself(tmp_path: Path) -> None:
    content = tokenizer_json()
    content["model"]["vocab"]["日"] = 261
    del content["model"]["vocab"][next(token for token, id in content["model"]["vocab"].items() if id == 261)]
    content["model"]["merges"].pop()
    assert Tokenizer.from_folder(saved(tmp_path, content)).decode([104, 261]) == "h日"


def test_beside_an_original_folder(tmp_path: Path) -> None:
    saved(tmp_path, tokenizer_json())
    (tmp_path / "original").mkdir()
    (tmp_path / "elsewhere").mkdir()
    assert Tokenizer.from_folder(tmp_path / "original").special(START)
    with pytest.raises(CheckpointError, match=r"no tokenizer\.json in .*elsewhere: copy it"):
        Tokenizer.from_folder(tmp_path / "elsewhere")


@pytest.mark.parametrize("content", ["", "{", "{}", "[]", '{"model": {"type": "BPE"}}', "\x00\xff"])
def test_a_broken_file(tmp_path: Path, content: str) -> None:
    (tmp_path / "tokenizer.json").write_text(content)
    with pytest.raises(CheckpointError, match=r"cannot read the tokenizer .* download"):
        Tokenizer.from_folder(tmp_path)


def test_a_tokenizer_of_another_kind(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="byte-level"):
        Tokenizer.from_folder(saved(tmp_path, tokenizer_json(decoder={"type": "Fuse"})))


def test_importing_it_stays_cheap() -> None:
    code = "import sys, mlx_gptoss.tokenizer, mlx_gptoss.harmony.parse; assert 'tokenizers' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=Path(__file__).parents[1])


@pytest.fixture(scope="module")
def bundled() -> Tokenizer:
    return Tokenizer.from_folder(Path(mlx_gptoss.__file__).parent / "nano")


@settings(deadline=None)
@given(
    st.lists(
        st.sampled_from(["word", " word", "x", " ", "\n", "'s", "12", "é", "日本", "-", "  A", "\r\n "]), max_size=60
    )
)
def test_slices_have_the_ids_of_the_whole(bundled: Tokenizer, pieces: list[str]) -> None:
    text = "".join(pieces)
    whole = bundled.encode(text)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("mlx_gptoss.tokenizer.SLICE_CHARACTERS", 5)
        slices = list(bundled.encode_slices(text))
    assert [id for ids in slices for id in ids] == whole
    assert len(slices) > 1 or len(text) < 200 or "word word" not in text


def test_other_threads_run_while_a_long_text_is_encoded(bundled: Tokenizer) -> None:
    """With the interpreter's lock held, this thread would stand still from the beginning to the end."""
    gaps, done = [0.0], threading.Event()
    encoding = threading.Thread(target=lambda: (bundled.encode("ab" * 250_000), done.set()))
    started = last = time.perf_counter()
    encoding.start()
    while not done.wait(0.001):
        now = time.perf_counter()
        gaps.append(now - last)
        last = now
    assert max(gaps) < 0.5 * (time.perf_counter() - started)
