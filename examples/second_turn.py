"""What the prefix cache saves: a conversation over a long text; the second turn computes only what is new.

python examples/second_turn.py [TOKENS] [MODEL] [BACKEND]
"""

import sys
import time

import mlx_gptoss

tokens = int(sys.argv[1]) if len(sys.argv) > 1 else 1000
model = mlx_gptoss.load(
    sys.argv[2] if len(sys.argv) > 2 and sys.argv[2] != "nano" else None,
    backend=sys.argv[3] if len(sys.argv) > 3 else "auto",
    max_context=tokens + 2000,
)
notes = "\n".join(f"Note {number}: the value of entry {number} is {number * number}." for number in range(tokens))
notes = model.tokenizer.decode(model.tokenizer.encode(notes)[:tokens])
messages = [{"role": "system", "content": notes}]
times = []
with model:
    for question in ("What is 17 + 25?", "What is 18 + 25?", "Reverse the word apple."):
        messages.append({"role": "user", "content": question})
        began, first, text, thoughts = time.perf_counter(), None, "", ""
        for event in model.stream(messages, max_tokens=64):
            first = first or time.perf_counter() - began
            if isinstance(event, mlx_gptoss.TextDelta):
                text += event.text
            elif isinstance(event, mlx_gptoss.ReasoningDelta):
                thoughts += event.text
            elif isinstance(event, mlx_gptoss.Finished):
                usage = event.usage
        times.append(first)
        print(f"{usage.prompt_tokens} tokens, {usage.cached_tokens} of them cached: first token after {first:.3f} s")
        messages.append({"role": "assistant", "content": text or "...", "reasoning": thoughts})
print(f"the second turn began {times[0] / times[1]:.0f} times as fast as the first")
