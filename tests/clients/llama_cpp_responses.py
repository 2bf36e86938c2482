"""The cases of llama.cpp's test_compat_oai_responses.py."""

from __future__ import annotations

from llama_cpp_cases import ASKED, case
from scripted import says


@case(
    ("schema", {"format": {"type": "json_schema", "name": "test", "schema": {"const": "foo"}}, "text": '"foo"'}),
    ("object", {"format": {"type": "json_object"}, "text": "{}"}),
    ("text", {"format": {"type": "text"}, "text": "Hi."}),
    ("no schema", {"format": {"type": "json_schema", "name": "test"}, "text": None}),
)
def case_responses_with_text_format(server, format, text):
    server.reply(says(text or ""))
    body = {"input": "Write an example", "max_output_tokens": 40, "text": {"format": format}}
    answer = server.post("/responses", body)
    assert answer.status_code == (200 if text else 400)
    assert text is None or answer.json()["output"][-1]["content"][0]["text"] == text


@case()
def case_responses_with_openai_library(server):
    server.reply(says("A very long book."))
    answer = server.client.responses.create(model="gpt-4.1", input=ASKED, max_output_tokens=40, temperature=0.8)
    assert answer.id.startswith("resp_") and answer.output[0].id.startswith("msg_")
    assert answer.output_text == "A very long book."


@case()
def case_responses_stream_with_openai_library(server):
    server.reply(says("A very long book."))
    stream = server.client.responses.create(model="gpt-4.1", input=ASKED, max_output_tokens=40, stream=True)
    events = list(stream)
    created, completed = events[0].response, events[-1].response
    assert created.id == completed.id and completed.output[0].id.startswith("msg_")
    ids = {event.item_id for event in events if event.type == "response.output_text.delta"}
    assert ids == {completed.output[0].id}
    text = "".join(event.delta for event in events if event.type == "response.output_text.delta")
    assert text == completed.output_text == "A very long book."


@case()
def case_responses_stream_with_llama_telemetry(server):
    asked = {"input": "Say hello", "max_output_tokens": 8, "timings_per_token": True, "return_progress": True}
    assert any("timings" in event for event in server.events("/responses", asked))
