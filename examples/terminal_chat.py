"""A chat in the terminal. Ctrl-C ends a reply, Ctrl-D the chat; it is kept in a file and goes on from there.

python examples/terminal_chat.py [CHAT.json]
"""

import json
import sys
from pathlib import Path

import mlx_gptoss
from mlx_gptoss import Conversation, Finished, ReasoningDelta, TextDelta

file = Path(sys.argv[1]) if len(sys.argv) > 1 else None
chat = Conversation.from_dict(json.loads(file.read_text())) if file and file.exists() else Conversation()
with mlx_gptoss.load() as model:
    while True:
        try:
            question = input("> ")
        except EOFError:
            break
        if not question.strip():
            continue
        events = model.stream(chat.append(question))
        try:
            for event in events:
                match event:
                    case ReasoningDelta():
                        print(f"\033[2m{event.text}\033[0m", end="", flush=True, file=sys.stderr)
                    case TextDelta():
                        print(event.text, end="", flush=True)
                    case Finished():
                        chat = event.conversation
        except KeyboardInterrupt:  # the question and half a reply are forgotten
            events.close()
        print()
if file:
    file.write_text(json.dumps(chat.to_dict(), indent=1))
