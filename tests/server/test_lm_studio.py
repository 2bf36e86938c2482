"""LM Studio's lists of models, and llama.cpp's small endpoints."""

from __future__ import annotations

from ollama_requests import SUM, WEATHER


def test_lm_studio_lists_the_model(http):
    (listed,) = http.get("/api/v0/models").json()["data"]
    assert listed == http.get("/api/v0/models/mlx-gptoss-nano").json() == http.get("/api/v0/models/gpt-4o").json()
    assert (listed["id"], listed["state"], listed["arch"]) == ("mlx-gptoss-nano", "loaded", "gpt-oss")
    assert listed["loaded_context_length"] == 4096 <= listed["max_context_length"]
    assert listed["type"] == "llm" and listed["capabilities"] == ["tool_use"] and listed["quantization"] == "MXFP4"
    (newer,) = http.get("/api/v1/models").json()["models"]
    assert newer["key"] == "mlx-gptoss-nano" and newer["loaded_instances"][0]["config"] == {"context_length": 4096}
    assert newer["capabilities"] == {"vision": False, "trained_for_tool_use": True} and newer["format"] == "mlx"


def test_lm_studio_has_openais_endpoints_and_errors(http):
    reply = http.post("/api/v0/chat/completions", json={"messages": SUM, "max_tokens": -1})
    assert reply.json()["choices"][0]["message"]["content"] == "12 + 30 = 42"
    assert http.post("/api/v0/completions", json={"prompt": "12 + 30 = "}).json()["object"] == "text_completion"
    for path in ("/api/v0/nothing", "/api/v1/nothing"):
        assert http.get(path).status_code == 404 and http.get(path).json()["error"]["message"]
    assert http.post("/api/v0/chat/completions", json={"messages": []}).json()["error"]["param"] == "messages"


def test_llama_cpp_props_and_slots(http):
    props = http.get("/props").json()
    assert props["total_slots"] == 4 and props["default_generation_settings"]["n_ctx"] == 4096
    slots = http.get("/slots").json()
    assert [slot["id"] for slot in slots] == [0, 1, 2, 3] and not any(slot["is_processing"] for slot in slots)


def test_llama_cpp_tokenize_and_back(http, model):
    text = "Hello <|start|> á"
    ids = http.post("/tokenize", json={"content": text}).json()["tokens"]
    assert ids == model.tokenizer.encode_with_specials(text)
    assert http.post("/detokenize", json={"tokens": ids}).json() == {"content": text}
    plain = http.post("/tokenize", json={"content": text, "parse_special": False, "add_special": True})
    assert plain.json()["tokens"] == model.tokenizer.encode(text) and "add_special" in plain.headers["X-Ignored-Fields"]
    pieces = http.post("/tokenize", json={"content": text, "with_pieces": True}).json()["tokens"]
    assert [piece["id"] for piece in pieces] == ids
    assert (
        b"".join(p.encode() if isinstance(p := piece["piece"], str) else bytes(p) for piece in pieces).decode() == text
    )
    for tokens in ([-1], [10**9], ["a"]):
        assert http.post("/detokenize", json={"tokens": tokens}).json()["error"]["param"].startswith("tokens")


def test_llama_cpp_apply_template_shows_the_prompt_of_a_chat(http, weather_tool):
    fields = {"messages": WEATHER, "tools": [weather_tool], "reasoning_effort": "high"}
    prompt = http.post("/apply-template", json=fields).json()["prompt"]
    assert "Reasoning: high" in prompt and "type get_weather" in prompt and prompt.endswith("<|start|>assistant")
    usage = http.post("/v1/chat/completions", json={**fields, "max_tokens": 1}).json()["usage"]
    assert len(http.post("/tokenize", json={"content": prompt}).json()["tokens"]) == usage["prompt_tokens"]
    assert http.post("/apply-template", json={"messages": []}).json()["error"]["param"] == "messages"
