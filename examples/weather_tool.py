"""A tool loop in full: the model asks for a function, this program calls it, the model answers from the result."""

import json

import mlx_gptoss

REPORTS = {"Paris": {"temperature": 18, "condition": "sunny"}, "Oslo": {"temperature": 4, "condition": "rainy"}}
TOOLS = [
    {
        "type": "function",
        "function": {
            "name": "get_weather",
            "description": "Get the current weather in a city.",
            "parameters": {
                "type": "object",
                "properties": {"location": {"type": "string", "description": "The city."}},
                "required": ["location"],
            },
        },
    }
]


def get_weather(location: str) -> dict:
    return REPORTS.get(location, {"error": f"no report for {location}"})


with mlx_gptoss.load() as model:
    reply = model.generate("What is the weather in Paris?", tools=TOOLS)
    while reply.tool_calls:
        conversation = reply.conversation
        for call in reply.tool_calls:
            result = get_weather(**json.loads(call.arguments))
            print(f"{call.name}({call.arguments}) -> {result}")
            conversation = conversation.with_result(call.name, json.dumps(result))
        reply = model.generate(conversation)
    print(reply.text)
