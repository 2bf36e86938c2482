"""An agent: the model calls a Python function, asynchronous here, and answers from its result."""

import asyncio
import sys
from typing import Annotated

import mlx_gptoss
from mlx_gptoss import TextDelta, ToolResult

REPORTS = {"Paris": {"temperature": 18, "condition": "sunny"}, "Oslo": {"temperature": 4, "condition": "rainy"}}


async def get_weather(location: Annotated[str, "City name"]) -> dict:
    """Get the current weather."""
    await asyncio.sleep(0.1)  # as a request to a weather service would
    return REPORTS.get(location, {"error": f"no report for {location}"})


async def main(question: str) -> None:
    with mlx_gptoss.load() as model:
        async for event in mlx_gptoss.aanswer(model, question, [get_weather], temperature=0):
            if isinstance(event, ToolResult):
                print(f"{event.call.name}({event.call.arguments}) -> {event.text}")
            elif isinstance(event, TextDelta):
                print(event.text, end="", flush=True)
        print()


asyncio.run(main(" ".join(sys.argv[1:]) or "What is the weather in Paris?"))
