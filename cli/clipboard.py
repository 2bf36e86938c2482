"""The clipboard: by the system's own program, or else by the terminal."""

from __future__ import annotations

import base64
import shutil
import subprocess
import sys

from mlx_gptoss.errors import GptOssError

PROGRAMS = (
    ("pbcopy",),
    ("wl-copy",),
    ("xclip", "-selection", "clipboard"),
    ("xsel", "--clipboard", "--input"),
    ("clip.exe",),
)
MAX_OSC52 = 74_994  # bytes; xterm and tmux drop longer ones (base64 of it is 100,000 characters)


def copy(text: str) -> str:
    """Copy the text, and return how: "copied by pbcopy". Raises GptOssError where nothing can."""
    for program in PROGRAMS:
        if shutil.which(program[0]):
            try:
                subprocess.run(program, input=text.encode(), check=True, timeout=5, stderr=subprocess.DEVNULL)
            except (OSError, subprocess.SubprocessError):
                continue  # such as xclip without a display
            return f"copied by {program[0]}"
    data = text.encode()
    if not sys.stdout.isatty() or len(data) > MAX_OSC52:
        raise GptOssError("there is no program for the clipboard: install wl-clipboard, xclip or xsel")
    # "Manipulate selection data" (xterm's control sequences). Terminals that do not know it ignore it.
    sys.stdout.write(f"\x1b]52;c;{base64.b64encode(data).decode()}\x07")
    sys.stdout.flush()
    return "sent to the terminal's clipboard (not every terminal takes it)"
