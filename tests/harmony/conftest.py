"""Fixtures: tokenizers (a small one built here, the bundled model's, the published one), openai-harmony's encoding of
the published vocabulary as the reference, a parser that checks its own deltas, and random texts from a grammar."""

from __future__ import annotations

import base64
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import Any

import pytest
from tokenizers import Regex, decoders, models, pre_tokenizers
from tokenizers import Tokenizer as BPE

from mlx_gptoss.api import NANO
from mlx_gptoss.harmony.grammar import Grammar
from mlx_gptoss.harmony.messages import Message
from mlx_gptoss.harmony.parse import Delta, Parser
from mlx_gptoss.tokenizer import CALL, SPECIALS, Tokenizer
from mlx_gptoss.untrusted.tokenizer_file import SPLIT_PATTERNS

VOCABULARY = Path(__file__).parents[2] / ".." / "shared" / "o200k_base.tiktoken"
PUBLISHED_IDS = {
    "<|startoftext|>": 199998,
    "<|endoftext|>": 199999,
    "<|reserved_200000|>": 200000,
    "<|reserved_200001|>": 200001,
    "<|return|>": 200002,
    "<|constrain|>": 200003,
    "<|reserved_200004|>": 200004,
    "<|channel|>": 200005,
    "<|start|>": 200006,
    "<|end|>": 200007,
    "<|message|>": 200008,
    "<|reserved_200009|>": 200009,
    "<|reserved_200010|>": 200010,
    "<|reserved_200011|>": 200011,
    "<|call|>": 200012,
}
SPLIT_PATTERN = "|".join(SPLIT_PATTERNS)


def byte_alphabet() -> list[str]:
    """Return the character that byte-level BPE uses for each byte, in the order of bytes."""
    others = iter(range(0x100, 0x200))
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    return [chr(byte if byte in printable else next(others)) for byte in range(256)]


def byte_level_tokenizer(
    ids: dict[bytes, int], merges: list[tuple[bytes, bytes]], specials: dict[str, int]
) -> Tokenizer:
    """Build a byte-level BPE tokenizer with the published split pattern."""
    letters = byte_alphabet()

    def as_text(token: bytes) -> str:
        return "".join(letters[byte] for byte in token)

    bpe = BPE(
        models.BPE(
            vocab={as_text(token): id for token, id in ids.items()},
            merges=[(as_text(left), as_text(right)) for left, right in merges],
            ignore_merges=True,
        )
    )
    split = pre_tokenizers.Split(Regex(SPLIT_PATTERN), "isolated")
    bpe.pre_tokenizer = pre_tokenizers.Sequence([split, pre_tokenizers.ByteLevel(False, use_regex=False)])
    bpe.decoder = decoders.ByteLevel()
    bpe.add_special_tokens(list(specials))
    assert all(bpe.token_to_id(name) == id for name, id in specials.items())
    return Tokenizer(bpe)


@pytest.fixture(scope="session")
def small() -> Tokenizer:
    """A tokenizer with the 256 bytes, a few words and Harmony's special tokens."""
    ids = {bytes([byte]): byte for byte in range(256)}
    merges = []
    for word in (b"as", b"sis", b"tan", b"fin", b"al", b"\xf0\x9f", b" to"):
        for end in range(2, len(word) + 1):
            if word[:end] not in ids:
                ids[word[:end]] = len(ids)
                merges.append((word[: end - 1], word[end - 1 : end]))
    return byte_level_tokenizer(ids, merges, {name: len(ids) + place for place, name in enumerate(SPECIALS)})


@dataclass(frozen=True)
class Parsed:
    deltas: list[Delta]
    messages: list[Message]


@pytest.fixture(scope="session")
def parse(small: Tokenizer) -> Callable[[str | Iterable[int]], Parsed]:
    """A function that parses ids, or text with special tokens, with the small vocabulary.

    It checks that deltas come in order, that each message starts once, and that deltas and messages agree.
    """

    def read(stream: str | Iterable[int]) -> Parsed:
        parser = Parser(small)
        ids = small.encode_with_specials(stream) if isinstance(stream, str) else stream
        deltas = [delta for id in ids for delta in parser.push(id)] + parser.finish()
        places = [delta.message for delta in deltas]
        assert places == sorted(places)
        assert [delta.message for delta in deltas if delta.starts] == list(range(len(parser.messages)))
        for place, message in enumerate(parser.messages):
            pieces = [delta for delta in deltas if delta.message == place]
            assert "".join(piece.text for piece in pieces) == message.content
            assert pieces[0].starts
            for piece in pieces:
                head = (piece.role, piece.channel, piece.recipient, piece.content_type, piece.name)
                assert head == (message.role, message.channel, message.recipient, message.content_type, message.name)
        return Parsed(deltas, parser.messages)

    return read


@pytest.fixture(scope="session")
def vocabulary_file() -> Path:
    if not VOCABULARY.is_file():
        pytest.skip("the published vocabulary o200k_base.tiktoken is not in ../shared")
    return VOCABULARY


@pytest.fixture(scope="session")
def published(vocabulary_file: Path) -> Tokenizer:
    """A tokenizer with the published vocabulary. The file lists tokens by rank; merges are derived from it."""
    rows = (line.split() for line in vocabulary_file.read_bytes().splitlines())
    ids = {base64.b64decode(token): int(rank) for token, rank in rows}
    merges = [last_merge(token, ids) for token in ids if len(token) > 1]
    return byte_level_tokenizer(ids, merges, PUBLISHED_IDS)


def last_merge(token: bytes, ids: dict[bytes, int]) -> tuple[bytes, bytes]:
    """Return the last merge that produces `token`: merge its bytes, lowest rank first, until two parts are left."""
    parts = [token[place : place + 1] for place in range(len(token))]
    while len(parts) > 2:
        ranked = ((ids.get(parts[at] + parts[at + 1], len(ids)), at) for at in range(len(parts) - 1))
        _, at = min(ranked)
        parts[at : at + 2] = [parts[at] + parts[at + 1]]
    return parts[0], parts[1]


@pytest.fixture(scope="session")
def reference(vocabulary_file: Path) -> Any:
    """openai-harmony's encoding. It reads the same vocabulary file instead of downloading one."""
    openai_harmony = pytest.importorskip("openai_harmony", reason="openai-harmony comes with the `test` extra")
    with pytest.MonkeyPatch.context() as environment:
        environment.setenv("TIKTOKEN_ENCODINGS_BASE", str(vocabulary_file.parent))
        return openai_harmony.load_harmony_encoding(openai_harmony.HarmonyEncodingName.HARMONY_GPT_OSS)


@pytest.fixture(scope="session")
def nano() -> Tokenizer:
    """The tokenizer of the bundled model."""
    return Tokenizer.from_folder(NANO)


@pytest.fixture(scope="session")
def allowed_ids() -> Callable[[bytes, int], list[int]]:
    """A function that lists the ids below `size` that a mask allows."""
    return lambda mask, size: [id for id in range(size) if mask[id >> 3] >> (id & 7) & 1]


@pytest.fixture(scope="session")
def sample_text(allowed_ids: Any) -> Callable[..., str | None]:
    """A function that samples a text under a grammar, or returns None if it gets too long.

    Tokens are drawn evenly from those that the mask allows. The end, and tokens that close a string, an object or an
    array, are preferred, so that most texts end.
    """

    def sample(grammar: Grammar, tokenizer: Tokenizer, end: str, random: Random, max_tokens: int = 2000) -> str | None:
        end_id, ids = tokenizer.special(end), []
        matcher = grammar.matcher(end_id)
        for _ in range(max_tokens):
            choices = allowed_ids(matcher.mask(), tokenizer.vocab_size)
            assert not [id for id in choices if tokenizer.is_special(id) and id != end_id]
            if end_id in choices and (len(choices) == 1 or random.random() < 0.3):
                return tokenizer.decode(ids)
            closing = [id for id in choices if tokenizer.token_bytes(id) in (b'"', b"}", b"]")]
            kept = closing if closing and random.random() < 0.3 else [id for id in choices if id != end_id]
            ids.append(random.choice(kept))
            matcher.accept(ids[-1])
        return None

    return sample


@pytest.fixture(scope="session")
def allows() -> Callable[[Grammar, Tokenizer, str], bool]:
    """Whether a text is in a grammar, from its first token to its end."""

    def allows(grammar: Grammar, tokenizer: Tokenizer, text: str) -> bool:
        matcher, end = grammar.matcher(tokenizer.special(CALL)), tokenizer.special(CALL)
        for id in [*tokenizer.encode(text), end]:
            mask = matcher.mask()
            if not mask[id >> 3] >> (id & 7) & 1:
                return False
            if id != end:
                matcher.accept(id)
        return True

    return allows
