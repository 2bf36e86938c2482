"""Time to the first token of the second turn of a long conversation with Claude Code, against that of the first.

    python tests/clients/second_turn.py [TOKENS] [TURNS]

Sends requests in Claude Code's shape to /v1/messages of a server with the bundled model: a long system prompt, its
tools, and a first system line that differs in every request, as Claude Code's billing header does. Prints each turn's
prompt tokens, those of them from the prefix cache, and the seconds until the first event with a token.
"""

from __future__ import annotations

import copy
import json
import sys
import time
from pathlib import Path

import httpx

import mlx_gptoss

sys.path.insert(0, str(Path(__file__).parents[1] / "server"))
from serving import serving

REQUEST = json.loads((Path(__file__).parent / "requests" / "claude-code-first.json").read_text())
MODEL_TOKENS = 48  # of each reply
MARGIN = 8192  # of the context, for tools and replies


def system_text(model: mlx_gptoss.Model, tokens: int) -> str:
    """A text of so many tokens."""
    notes = " ".join(f"Note {number}: entry {number} is {number * number}." for number in range(tokens))
    return model.tokenizer.decode(model.tokenizer.encode(notes)[:tokens])


def first_token(http: httpx.Client, body: dict) -> tuple[float, dict, list[dict]]:
    """Seconds to the first delta, the usage, and the reply's blocks."""
    began, first, events = time.perf_counter(), None, []
    with http.stream("POST", REQUEST["path"], json=body, headers=REQUEST["headers"]) as answer:
        answer.raise_for_status()
        for line in answer.iter_lines():
            if line.startswith("data: "):
                events.append(json.loads(line.removeprefix("data: ")))
                if events[-1]["type"] == "content_block_delta":
                    first = first or time.perf_counter() - began
    usage = next(event["usage"] for event in reversed(events) if event["type"] == "message_delta")
    text = "".join(event["delta"].get("text", "") for event in events if event["type"] == "content_block_delta")
    return first or time.perf_counter() - began, usage, [{"type": "text", "text": text or "..."}]


def main(tokens: int, turns: int) -> None:
    with mlx_gptoss.load(slots=1, max_context=tokens + MARGIN) as model, serving(model) as server:
        body = copy.deepcopy(REQUEST["body"])
        body["max_tokens"] = MODEL_TOKENS
        body["system"][-1]["text"] = system_text(model, tokens)
        times = []
        with httpx.Client(base_url=server.url, timeout=600) as http:
            for turn in range(turns):
                body["system"][0]["text"] = f"x-anthropic-billing-header: cc_version=2.1.197; cch={turn:05x};"
                seconds, usage, blocks = first_token(http, body)
                times.append(seconds)
                cached = usage["cache_read_input_tokens"]
                print(f"turn {turn + 1}: {usage['input_tokens'] + cached} tokens, {cached} cached: {seconds:.3f} s")
                body["messages"] += [
                    {"role": "assistant", "content": blocks},
                    {"role": "user", "content": [{"type": "text", "text": f"What is {turn + 20} + 25?"}]},
                ]
        print(f"the second turn's first token came {times[0] / times[1]:.0f} times as fast")


if __name__ == "__main__":
    given = [int(argument) for argument in sys.argv[1:]]
    main(*given, *(20000, 3)[len(given) :])
