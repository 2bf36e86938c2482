"""Answer many questions at once and say how sure the model was: python examples/batch_scorer.py [FILE.txt]

The score is the mean log-probability of the answer's tokens; 0 is certain. One question a line, the surest first.
"""

import asyncio
import math
import sys
from pathlib import Path

import mlx_gptoss
from mlx_gptoss import TextDelta

QUESTIONS = ["What is 12 + 30?", "Reverse the word apple.", "What is the capital of France?", "What is 7 + 8?"]


async def score(model: mlx_gptoss.Model, question: str) -> tuple[float, str, str]:
    logprobs, text = [], ""
    async for event in model.astream(question, temperature=0):
        if isinstance(event, TextDelta):
            text += event.text
            logprobs += [token.logprob for token in event.tokens]
    return sum(logprobs) / max(1, len(logprobs)), question, text


async def main(questions: list[str]) -> None:
    with mlx_gptoss.load(slots=8) as model:  # eight at once; others wait
        scored = await asyncio.gather(*(score(model, question) for question in questions))
    for mean, question, text in sorted(scored, reverse=True):
        print(f"{mean:8.4f}  {math.exp(mean):7.2%}  {question}  {text}")


asyncio.run(main(Path(sys.argv[1]).read_text().splitlines() if len(sys.argv) > 1 else QUESTIONS))
