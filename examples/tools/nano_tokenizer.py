"""The bundled model's tokenizer: a byte-level BPE with one token per byte, plus one for each fixed phrase.

Letters and digits stay single tokens, so what the model learns about some words holds for every word. Phrases that
Harmony repeats in every prompt, and phrases that the model often writes, take one token each.
"""

from __future__ import annotations

import json
from pathlib import Path

SPECIALS = (
    "<|startoftext|>", "<|endoftext|>", "<|return|>", "<|constrain|>", "<|channel|>", "<|start|>", "<|end|>",
    "<|message|>",
    "<|call|>", "<|endofprompt|>",
)  # fmt: skip

# Words of a message's header. They are single tokens only at the start of the text between two special tokens.
HEADER = ("system", "developer", "user", "assistant", "analysis", "commentary", "final", "json")

PROMPT = (
    "You are ChatGPT, a large language model trained by OpenAI.\nKnowledge cutoff: 2024-06",
    "\nCurrent date: ",
    "\n\nReasoning: low",
    "\n\nReasoning: medium",
    "\n\nReasoning: high",
    "\n\n# Valid channels: analysis, commentary, final. Channel must be included for every message.",
    "\nCalls to these tools must go to the commentary channel: 'functions'.",
    "# Instructions\n\n",
    "# Tools\n\n## functions\n\nnamespace functions {\n\n",
    "} // namespace functions",
    "type get_weather",
    "type get_current_weather",
    " = (_: {\n",
    "}) => any;\n\n",
    "// ",
    "location: string,\n",
    "city: string,\n",
    ": string,\n",
    '?: "celsius" | "fahrenheit",\n',
    " to=functions.",
    " to=assistant",
    "functions.",
    "get_weather",
    "get_current_weather",
    '{"location": "',
    '{"city": "',
    '"}',
    '"temperature": ',
    '"condition": "',
)

SPEECH = (
    ", column by column from the right:\n", ", write ", ", carry ", ".\nThe sum is ",
    "\nLet me check it the other way round:\n",
    "Both agree.", "I number the letters of ", "\nFrom the last to the first:\n", "\nThat gives ", "The capital of ",
    "The question is about ", "I know this.", "\nI would answer: ", "\nThat is right.", "\nThat is polite.",
    " I answer kindly.",
    "This is ", "I cannot do this.", "It is no sum, no word to reverse and nothing that I know.",
    "I say what I can do.",
    "I am a very small ", "model and cannot do that. ", "I can add numbers up to 999, ", "reverse words, ",
    "name capitals, ",
    "tell you about gpt-oss", "and ask a get_weather function for the weather.", "The user asks about the weather in ",
    "I call ",
    "\nIt needs the ", "\nIts result will tell me what to answer.", " has answered. ", "I tell the user.",
    "\nThe result is about ",
    "It is ", " degrees and ", " degrees", "No function for the weather.", " I say so.", ", but I cannot know it.",
    "I cannot look up the weather: ", "no get_weather function was offered to me.", "You are welcome!",
    "What can I do for you?",
    "gpt-oss",
)  # fmt: skip


def byte_alphabet() -> list[str]:
    """GPT-2's printable character for each of the 256 bytes."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    spare = iter(range(256, 512))
    return [chr(byte if byte in printable else next(spare)) for byte in range(256)]


def escape(text: str) -> str:
    return "".join("\\" + c if c in "\\.^$*+?{}[]|()#" else c for c in text)


def tokenizer_json() -> str:
    """The file `tokenizer.json`: merges are not needed, because every piece is one byte or a whole phrase."""
    alphabet = byte_alphabet()
    phrases = sorted({*PROMPT, *SPEECH}, key=lambda p: (-len(p), p))
    pieces = [*alphabet, *("".join(alphabet[b] for b in p.encode()) for p in (*HEADER, *phrases))]
    header = rf"\A(?:{'|'.join(HEADER)})(?= |\z)"
    split = "|".join([header, *map(escape, phrases), r"[\s\S]"])
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}
    plain = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    return json.dumps(
        {
            "version": "1.0",
            "truncation": None,
            "padding": None,
            "added_tokens": [{"id": len(pieces) + i, "content": name, **plain} for i, name in enumerate(SPECIALS)],
            "normalizer": None,
            "pre_tokenizer": {
                "type": "Sequence",
                "pretokenizers": [
                    {"type": "Split", "pattern": {"Regex": split}, "behavior": "Isolated", "invert": False},
                    byte_level,
                ],
            },
            "post_processor": None,
            "decoder": byte_level,
            "model": {
                "type": "BPE",
                "dropout": None,
                "unk_token": None,
                "continuing_subword_prefix": None,
                "end_of_word_suffix": None,
                "fuse_unk": False,
                "byte_fallback": False,
                "ignore_merges": True,
                "vocab": {piece: i for i, piece in enumerate(pieces)},
                "merges": [],
            },
        },
        ensure_ascii=False,
        indent=1,
    )


def write_tokenizer(folder: Path) -> dict[str, int]:
    """Write `tokenizer.json` into the folder; return the ids of the special tokens."""
    text = tokenizer_json()
    (folder / "tokenizer.json").write_text(text, encoding="utf-8")
    return {entry["content"]: entry["id"] for entry in json.loads(text)["added_tokens"]}
