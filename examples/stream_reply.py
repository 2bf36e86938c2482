"""Print a reply as it arrives: the model's reasoning in brackets, then its answer."""

import sys

import mlx_gptoss
from mlx_gptoss import Finished, ReasoningDelta, TextDelta

question = " ".join(sys.argv[1:]) or "What is 128 + 256?"
with mlx_gptoss.load() as model:
    print("[", end="")
    answering = False
    for event in model.stream(question, reasoning="high"):
        match event:
            case ReasoningDelta():
                print(event.text, end="", flush=True)
            case TextDelta():
                print("" if answering else "]\n", event.text, sep="", end="", flush=True)
                answering = True
            case Finished():
                print(f"\n{event.usage.completion_tokens} tokens at {event.timings.decode_tok_s:.0f} tokens/s")
