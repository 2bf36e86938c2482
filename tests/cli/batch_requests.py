"""Requests of batch files, and what of their answers is the same in every run."""

from __future__ import annotations

import json
import sys

CLI = [sys.executable, "-m", "mlx_gptoss_cli", "batch"]
HERE = ["--backend", "mlx", "--device", "cpu"]
CHAT, RESPONSES, COMPLETIONS = "/v1/chat/completions", "/v1/responses", "/v1/completions"
CHANGING = {"id", "created", "created_at", "completed_at"}


def question(number):
    """A greedy request, of each endpoint in turn."""
    text = f"What is {number} + {number * 7 % 50}?"
    return [
        (CHAT, {"messages": [{"role": "user", "content": text}], "temperature": 0, "max_tokens": 24}),
        (RESPONSES, {"input": text, "temperature": 0, "max_output_tokens": 24}),
        (COMPLETIONS, {"prompt": text, "temperature": 0, "max_tokens": 24}),
    ][number % 3]


def request(custom_id, url, body, **more):
    return json.dumps({"custom_id": custom_id, "method": "POST", "url": url, "body": body, **more}).encode()


ONE = request("a", COMPLETIONS, {"prompt": "Hi", "max_tokens": 1})


def steady(body):
    """The fields of an answer that are the same in every run."""
    if isinstance(body, dict):
        return {name: steady(value) for name, value in body.items() if name not in CHANGING}
    return [steady(value) for value in body] if isinstance(body, list) else body


def read(path):
    return [json.loads(line) for line in path.read_bytes().splitlines()]


def by_id(entries):
    answers = {entry["custom_id"]: steady(entry["response"]["body"]) for entry in entries}
    assert len(answers) == len(entries)
    return answers
