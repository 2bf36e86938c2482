"""Requests to Ollama's API, and what its tests read from the answers."""

from __future__ import annotations

import json

MODEL = "gpt-oss:20b"
SUM = [{"role": "user", "content": "What is 12 + 30?"}]
WEATHER = [{"role": "user", "content": "What is the weather in Oslo?"}]
RESULT = '{"temperature": 4, "condition": "rainy"}'
ANSWER = "It is 4 degrees and rainy in Oslo."
DURATIONS = {"total_duration", "prompt_eval_duration", "eval_duration"}


def lines(answer):
    return [json.loads(line) for line in answer.text.splitlines()]


def chat(http, **fields):
    return http.post("/api/chat", json={"model": MODEL, "messages": SUM, **fields})
