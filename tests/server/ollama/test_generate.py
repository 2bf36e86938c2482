"""/api/generate, streamed or not."""

from __future__ import annotations

import pytest
from ollama_requests import MODEL, SUM


def test_generate_streamed_or_not(client):
    reply = client.generate(MODEL, "What is 12 + 30?")
    assert (reply.response, reply.done_reason) == ("12 + 30 = 42", "stop") and "The sum is 42" in reply.thinking
    chunks = list(client.generate(MODEL, "What is 12 + 30?", stream=True))
    assert "".join(chunk.response for chunk in chunks) == reply.response
    assert "".join(chunk.thinking or "" for chunk in chunks) == reply.thinking
    assert chunks[-1].eval_count == reply.eval_count and chunks[-1].done
    assert client.generate(MODEL, "What is 12 + 30?", think=False).thinking is None


def test_generate_with_instructions_equals_chat(client):
    asked = [{"role": "system", "content": "Be brief."}, *SUM]
    reply = client.generate(MODEL, "What is 12 + 30?", system="Be brief.")
    assert reply.prompt_eval_count == client.chat(MODEL, asked).prompt_eval_count


def test_raw_continues_the_text(client, model):
    prompt = "<|start|>user<|message|>What is 12 + 30?<|end|><|start|>assistant<|channel|>final<|message|>"
    ids = model.tokenizer.encode_with_specials(prompt)
    expected = model.complete(ids, max_tokens=20)
    reply = client.generate(MODEL, prompt, raw=True, options={"num_predict": 20})
    assert (reply.response, reply.prompt_eval_count) == (expected.text, len(ids))


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"suffix": "x"}, "suffix"),
        ({"images": ["aGk="]}, "images cannot be read"),
        ({"raw": True, "system": "x"}, "system has no place"),
        ({"raw": True, "format": "json"}, "format"),
        ({"format": "xml"}, 'use "json" or a JSON schema'),
    ],
)
def test_generate_refuses(http, fields, words):
    answer = http.post("/api/generate", json={"model": MODEL, "prompt": "Hi", **fields})
    assert answer.status_code == 400 and words in answer.json()["error"]
