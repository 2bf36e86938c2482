"""The Python session of the tool python. This file runs inside the sandbox, as `python -I -c SOURCE`, and stands alone.

Requests are JSON lines on the standard input, {"code", "timeout_s"}; their replies are JSON lines on the descriptor
CONTROL, {"error": a text or null}. What the code prints goes to the standard output, which the server reads.

Arguments: the limits as JSON, {"memory": bytes, "processes": n, "file": bytes, "folder": the working directory}.
"""

from __future__ import annotations

import ast
import asyncio
import ctypes
import json
import linecache
import os
import resource
import signal
import subprocess
import sys
import threading
import time
import traceback
from types import FrameType
from typing import Any

CONTROL = 3  # the descriptor of the replies


class OutOfTime(BaseException):
    """The call's time is up."""


def limit(limits: dict[str, Any]) -> None:
    """Lower the limits of this process and its children, for good."""
    wanted = {
        "RLIMIT_AS": limits["memory"],
        "RLIMIT_NPROC": limits["processes"],
        "RLIMIT_FSIZE": limits["file"],
        "RLIMIT_CORE": 0,
        "RLIMIT_NOFILE": 256,
    }
    for name, value in wanted.items():
        kind = getattr(resource, name, None)
        if kind is None:
            continue
        _, hard = resource.getrlimit(kind)
        value = value if hard == resource.RLIM_INFINITY else min(value, hard)
        try:
            resource.setrlimit(kind, (value, value))
        except (OSError, ValueError):  # macOS refuses RLIMIT_AS; the server watches the memory there
            continue


def end_with_the_server() -> None:
    """End when the process that started this one is gone, also while code runs."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(1, signal.SIGKILL, 0, 0, 0)  # PR_SET_PDEATHSIG
    parent = os.getppid()

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(1)
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def shell(command: str) -> None:
    """`!command` of a notebook."""
    sys.stdout.flush()
    subprocess.run(command, shell=True, stdin=subprocess.DEVNULL, check=False)


def without_magics(code: str) -> str:
    """The code with a notebook's `!command` lines as calls of shell(), and `%magic` lines as comments."""
    lines = []
    for line in code.split("\n"):
        word = line.lstrip()
        indent = line[: len(line) - len(word)]
        if word.startswith("!"):
            line = f"{indent}__shell__({word[1:].strip()!r})"
        elif word.startswith("%"):
            line = f"{indent}pass  # {word}"
        lines.append(line)
    return "\n".join(lines)


class Session:
    """One namespace in which code runs, call after call."""

    def __init__(self) -> None:
        self.names: dict[str, Any] = {"__name__": "__main__", "__builtins__": __builtins__, "__shell__": shell}
        self.count = 0
        self.loop: asyncio.AbstractEventLoop | None = None

    def run(self, code: str, timeout_s: float) -> str | None:
        """Run code, print the value of a last expression, and return the error that ended it."""
        self.count += 1
        name = f"<cell {self.count}>"
        signal.signal(signal.SIGALRM, out_of_time)
        signal.setitimer(signal.ITIMER_REAL, timeout_s, 1)  # and again, should the first be caught
        try:
            self.execute(self.parse(code, name), name)
            return None
        except OutOfTime:
            signal.setitimer(signal.ITIMER_REAL, 0)
            print(f"TimeoutError: the code ran for more than {timeout_s:g} seconds and was interrupted")
            return f"timed out after {timeout_s:g} seconds"
        except BaseException as error:
            signal.setitimer(signal.ITIMER_REAL, 0)
            print(report(error), end="")
            return f"{type(error).__name__}: {error}"[:1000]
        finally:
            signal.setitimer(signal.ITIMER_REAL, 0)

    def parse(self, code: str, name: str) -> ast.Module:
        """The code as a module. Its lines are kept for tracebacks."""
        try:
            module = ast.parse(code, name)
        except SyntaxError:
            plain = without_magics(code)
            if plain == code:
                raise
            code, module = plain, ast.parse(plain, name)
        linecache.cache[name] = (len(code), None, [f"{line}\n" for line in code.split("\n")], name)
        return module

    def execute(self, module: ast.Module, name: str) -> None:
        last = module.body.pop() if module.body and isinstance(module.body[-1], ast.Expr) else None
        if module.body:
            self.evaluate(module, name, "exec")
        if isinstance(last, ast.Expr):
            value = self.evaluate(ast.Expression(last.value), name, "eval")
            if value is not None:
                self.names["_"] = value
                print(repr(value))

    def evaluate(self, tree: Any, name: str, mode: str) -> Any:
        """Run a piece of code. It may await at the top level, as in a notebook."""
        compiled = compile(tree, name, mode, ast.PyCF_ALLOW_TOP_LEVEL_AWAIT)
        value = eval(compiled, self.names)
        if compiled.co_flags & 0x80:  # CO_COROUTINE
            self.loop = self.loop or asyncio.new_event_loop()
            value = self.loop.run_until_complete(value)
        return value


def out_of_time(number: int, frame: FrameType | None) -> None:
    raise OutOfTime


def report(error: BaseException) -> str:
    """The traceback, from the first line of the user's code on."""
    trace = error.__traceback__
    while trace is not None and not trace.tb_frame.f_code.co_filename.startswith("<cell "):
        trace = trace.tb_next
    try:
        return "".join(traceback.format_exception(type(error), error, trace))
    except BaseException:  # the error's own __str__ fails
        return f"{type(error).__name__}\n"


def main() -> None:
    limits = json.loads(sys.argv[1])
    end_with_the_server()
    requests = os.fdopen(os.dup(0), "r", encoding="utf-8")
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    os.dup2(1, 2)
    os.set_inheritable(requests.fileno(), False)
    os.set_inheritable(CONTROL, False)
    os.chdir(limits["folder"])
    sys.path.insert(0, limits["folder"])
    sys.stdout = sys.stderr = open(1, "w", encoding="utf-8", errors="backslashreplace", closefd=False)  # noqa: SIM115
    limit(limits)
    session = Session()
    os.write(CONTROL, b'{"ready": true}\n')
    for line in requests:
        request = json.loads(line)
        error = session.run(request["code"], request["timeout_s"])
        try:
            sys.stdout.flush()
        except (OSError, ValueError):
            pass
        if not (isinstance(sys.stdout, object) and hasattr(sys.stdout, "flush")):
            break
        os.write(CONTROL, json.dumps({"error": error}).encode() + b"\n")


if __name__ == "__main__":
    main()
