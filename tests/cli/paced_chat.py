"""`mlx-gptoss`, with a model that stops in the middle of each answer until the file that $GATE names is there.

With $ANSWER, that file's text stands in place of the model's, in pieces of three characters.
"""

from __future__ import annotations

import os
import time
from collections import deque
from pathlib import Path

from mlx_gptoss_cli.main import main

from mlx_gptoss.chat.reply import Event, TextDelta
from mlx_gptoss.chat.stream import Events

GATE, ANSWER = os.environ.get("GATE"), os.environ.get("ANSWER")
PIECES = int(os.environ.get("PIECES", "5"))  # of text before the stop
next_of_model = Events.__next__


def paced(events: Events) -> Event:
    event = scripted(events) if ANSWER else next_of_model(events)
    if isinstance(event, TextDelta):
        vars(events)["pieces"] = vars(events).get("pieces", 0) + 1
        while GATE and vars(events)["pieces"] == PIECES + 1 and not os.path.exists(GATE):
            time.sleep(0.005)
    return event


def scripted(events: Events) -> Event:
    left = vars(events).get("left")
    if left is None or not left:
        event = next_of_model(events)
        while isinstance(event, TextDelta) and left is not None:
            event = next_of_model(events)
        if not isinstance(event, TextDelta):
            return event
        text = Path(ANSWER or "").read_text("utf-8")
        left = vars(events)["left"] = deque(text[at : at + 3] for at in range(0, len(text), 3))
    return TextDelta(left.popleft())


if __name__ == "__main__":
    Events.__next__ = paced  # type: ignore[method-assign]
    main()
