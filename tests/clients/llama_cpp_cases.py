"""What the cases of llama.cpp's server tests share: how they register, and who asks for them."""

from __future__ import annotations

import json

import httpx
import openai

CASES = {}

ASKED = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Name a good book."}]
CODE = [{"role": "system", "content": "You write code."}, {"role": "user", "content": "Write an example."}]

STREAMS = (("whole", {"stream": False}), ("streamed", {"stream": True}))


def function(name, **properties):
    parameters = {"type": "object", "properties": properties, "required": list(properties)}
    return {"type": "function", "function": {"name": name, "description": "", "parameters": parameters}}


TEST_TOOL = function("test", success={"type": "boolean", "const": True})
PYTHON_TOOL = function("python", code={"type": "string", "description": "The code to run."})
WEATHER_TOOL = function("get_current_weather", location={"type": "string", "description": "City and country"})
ANTHROPIC_TOOL = {
    "name": "get_weather",
    "description": "Get the current weather in a place.",
    "input_schema": WEATHER_TOOL["function"]["parameters"],
}


def case(*variants):
    """Register a function as the case of its name without "case_", or one case for each keyword argument's set."""

    def register(check):
        name = check.__name__.removeprefix("case_")
        for label, arguments in variants or (("", {}),):
            CASES[f"{name}[{label}]" if label else name] = lambda server, a=arguments: check(server, **a)
        return check

    return register


class Asker:
    """Sends requests to the server; the model answers with `reply`."""

    def __init__(self, running, next_reply):
        self.url, self.script, self._next = running.url, running.script, next_reply
        self.http = httpx.Client(base_url=self.url, timeout=60)

    def reply(self, *messages):
        self._next.reply = messages

    def post(self, path, body):
        return self.http.post(path, json=body)

    def ok(self, path, body):
        answer = self.post(path, body)
        assert answer.status_code == 200, answer.text
        return answer.json()

    def events(self, path, body):
        answer = self.post(path, {**body, "stream": True})
        assert answer.status_code == 200, answer.text
        data = [line.removeprefix("data: ") for line in answer.text.splitlines() if line.startswith("data: ")]
        return [json.loads(line) for line in data if line != "[DONE]"]

    def message(self, body):
        """The message of a chat completion, streamed or not, as llama.cpp's make_any_request() has it."""
        if not body.get("stream"):
            return self.ok("/v1/chat/completions", body)["choices"][0]["message"]
        message = {}
        for event in self.events("/v1/chat/completions", body):
            for key, value in event["choices"][0]["delta"].items() if event["choices"] else ():
                if key == "tool_calls":
                    for part in value:
                        made = message.setdefault("tool_calls", [])
                        if len(made) == part["index"]:
                            made.append({"function": {"name": part["function"]["name"], "arguments": ""}})
                        made[part["index"]]["function"]["arguments"] += part["function"].get("arguments", "")
                elif isinstance(value, str):
                    message[key] = message.get(key, "") + value
        return message

    @property
    def client(self):
        return openai.OpenAI(base_url=f"{self.url}/v1", api_key="none", max_retries=0)
