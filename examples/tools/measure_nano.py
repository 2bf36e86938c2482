"""Ask the bundled model questions that its training never saw, and count the answers that match exactly.

python examples/tools/measure_nano.py [--model FOLDER] [--per-kind 34] [--kind KIND] [--json]
"""

from __future__ import annotations

import argparse
import json
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import replace

import nano_tasks as tasks

import mlx_gptoss
from mlx_gptoss.harmony.messages import ResponseFormat

GREEDY = mlx_gptoss.Sampling(temperature=0)


def right(example: tasks.Example, reply: mlx_gptoss.Reply) -> bool:
    """Whether the final text is the expected one; of JSON and of a call, the values are compared."""
    if example.turn.json:
        return parsed(reply.text) == json.loads(example.turn.final) and not reply.tool_calls
    if not example.turn.recipient:
        return reply.text == example.turn.final and not reply.tool_calls
    calls = [(f"functions.{call.name}", parsed(call.arguments)) for call in reply.tool_calls]
    return calls == [(example.turn.recipient, json.loads(example.turn.arguments))]


def parsed(text: str) -> object:
    try:
        return json.loads(text)
    except ValueError:
        return None


def request(form: ResponseFormat | None) -> dict[str, object] | None:
    """The response_format of a request."""
    return form and {"type": "json_schema", "json_schema": {"name": form.name, "schema": form.schema}}


def measure(
    model: mlx_gptoss.Model, per_kind: int, show_wrong: bool = False, kinds: Iterable[str] = tasks.MIX
) -> dict[str, tuple[int, int]]:
    """(right, asked) by kind, with greedy decoding."""
    counts: dict[str, tuple[int, int]] = defaultdict(lambda: (0, 0))
    for example in tasks.held_out(per_kind, kinds=kinds):
        form = request(example.conversation.response_format)
        conversation = replace(example.conversation, response_format=None)  # as a request has it, with its mask
        reply = model.generate(conversation, sampling=GREEDY, max_tokens=600, response_format=form)
        ok = right(example, reply)
        good, asked = counts[example.kind]
        counts[example.kind] = (good + ok, asked + 1)
        if show_wrong and not ok:
            print(f"{example.kind}: {example.conversation.messages[-1].content!r} -> {reply.text!r} {reply.tool_calls}")
    return dict(counts)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="a checkpoint; the bundled model by default")
    parser.add_argument("--per-kind", type=int, default=34)
    parser.add_argument("--kind", action="append", choices=tasks.MIX, help="ask this kind only; may be repeated")
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--wrong", action="store_true", help="print the wrong answers")
    options = parser.parse_args()
    with mlx_gptoss.load(options.model) as model:
        counts = measure(model, options.per_kind, options.wrong, options.kind or tasks.MIX)
    counts["all"] = (sum(good for good, _ in counts.values()), sum(asked for _, asked in counts.values()))
    if options.json:
        print(json.dumps({kind: {"right": good, "asked": asked} for kind, (good, asked) in counts.items()}, indent=2))
        return
    for kind, (good, asked) in counts.items():
        print(f"{kind:<16}{good:>4} of {asked:<4}{good / asked:>7.1%}")


if __name__ == "__main__":
    main()
