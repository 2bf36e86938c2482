"""The Python session of the tool python. This file runs inside the sandbox, as `python -I -c SOURCE`, and stands alone.

Requests are JSON lines on the standard input, {"code", "timeout_s"}; their replies are JSON lines on another
descriptor, {"error": a text or null}. What the code prints goes to the standard output, which the server reads.

Arguments: the limits as JSON, {"memory": bytes, "processes": n, "file": bytes, "folder": the working directory,
"confined": whether there is a sandbox around it, "control": the descriptor of the replies}.
"""

from __future__ import annotations

import ast
import asyncio
import contextlib
import ctypes
import errno
import json
import linecache
import os
import resource
import signal
import struct
import subprocess
import sys
import threading
import time
import traceback
from types import FrameType
from typing import Any, TextIO

# Linux system calls that a confined session does without: new namespaces and mounts, memory that no limit counts, and
# interfaces of the kernel that have had many holes. The columns are the numbers on x86_64 and aarch64.
DENIED_CALLS = {
    "unshare": (272, 97),
    "setns": (308, 268),
    "mount": (165, 40),
    "umount2": (166, 39),
    "pivot_root": (155, 41),
    "open_tree": (428, 428),
    "move_mount": (429, 429),
    "fsopen": (430, 430),
    "fsconfig": (431, 431),
    "fsmount": (432, 432),
    "mount_setattr": (442, 442),
    "open_by_handle_at": (304, 265),
    "memfd_create": (319, 279),
    "memfd_secret": (447, 447),
    "shmget": (29, 194),
    "ptrace": (101, 117),
    "bpf": (321, 280),
    "userfaultfd": (323, 282),
    "perf_event_open": (298, 241),
    "io_uring_setup": (425, 425),
    "add_key": (248, 217),
    "request_key": (249, 218),
    "keyctl": (250, 219),
}
SOCKET, CLONE, CLONE3 = (41, 198), (56, 220), (435, 435)
SOCKET_FAMILIES = (1, 2, 10)  # AF_UNIX, AF_INET, AF_INET6; others, such as AF_VSOCK, know no network namespace
CLONE_NEWUSER = 0x10000000
MACHINES = {"x86_64": (0, 0xC000003E), "aarch64": (1, 0xC00000B7)}  # column, AUDIT_ARCH


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


def filter_system_calls() -> None:
    """Make the kernel refuse DENIED_CALLS in this process and its children. Other machines go without this filter."""
    if sys.platform != "linux" or os.uname().machine not in MACHINES:
        return
    column, architecture = MACHINES[os.uname().machine]
    allow, load, equal, bits = 0x7FFF0000, 0x20, 0x15, 0x45  # SECCOMP_RET_ALLOW; BPF: LD W ABS, JEQ K, JSET K
    refuse = [0x00050000 | number for number in (errno.EPERM, errno.ENOSYS, errno.EAFNOSUPPORT)]
    program = [(load, 0, 0, 4), (equal, 1, 0, architecture), (0x06, 0, 0, refuse[0]), (load, 0, 0, 0)]
    program += [(bits, 0, 1, 0x40000000), (0x06, 0, 0, refuse[0])]  # x32, another numbering
    for number in (numbers[column] for numbers in DENIED_CALLS.values()):
        program += [(equal, 0, 1, number), (0x06, 0, 0, refuse[0])]
    program += [(equal, 0, 1, CLONE3[column]), (0x06, 0, 0, refuse[1])]  # its flags are in memory; libc uses clone then
    program += [(equal, 0, 3, CLONE[column]), (load, 0, 0, 16), (bits, 0, 1, CLONE_NEWUSER), (0x06, 0, 0, refuse[0])]
    program += [(load, 0, 0, 0), (equal, 0, 5, SOCKET[column]), (load, 0, 0, 16)]
    program += [(equal, 3 - index, 0, family) for index, family in enumerate(SOCKET_FAMILIES)]
    program += [(0x06, 0, 0, refuse[2]), (0x06, 0, 0, allow)]
    packed = b"".join(struct.pack("=HBBI", *step) for step in program)
    code = ctypes.create_string_buffer(packed, len(packed))
    filter = struct.pack("@HP", len(program), ctypes.addressof(code))
    libc = ctypes.CDLL(None, use_errno=True)
    no_new_privileges, set_seccomp, filter_mode = 38, 22, 2
    if libc.prctl(no_new_privileges, 1, 0, 0, 0) or libc.prctl(set_seccomp, filter_mode, filter, 0, 0):
        raise OSError(ctypes.get_errno(), "the filter of system calls cannot be set")


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

    def __init__(self, output: TextIO) -> None:
        self.output = output
        self.names: dict[str, Any] = {"__name__": "__main__", "__builtins__": __builtins__, "__shell__": shell}
        self.count = 0
        self.loop: asyncio.AbstractEventLoop | None = None

    def run(self, code: str, timeout_s: float) -> str | None:
        """Run code, print the value of a last expression, and return the error that ended it."""
        self.count += 1
        name = f"<cell {self.count}>"
        sys.stdout = sys.stderr = self.output
        signal.signal(signal.SIGALRM, out_of_time)
        signal.setitimer(signal.ITIMER_REAL, timeout_s, 1)  # and again, should the first be caught
        try:
            self.execute(self.parse(code, name), name)
            return None
        except OutOfTime:
            signal.setitimer(signal.ITIMER_REAL, 0)
            self.output.write(f"TimeoutError: the code ran for more than {timeout_s:g} seconds and was interrupted\n")
            return f"timed out after {timeout_s:g} seconds"
        except BaseException as error:
            signal.setitimer(signal.ITIMER_REAL, 0)
            text = report(error)
            self.output.write(text)
            return text.rstrip().rpartition("\n")[2][:1000]
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
    control = limits["control"]
    os.set_inheritable(control, False)
    os.chdir(limits["folder"])
    sys.path.insert(0, limits["folder"])
    output = open(1, "w", encoding="utf-8", errors="backslashreplace", closefd=False)  # noqa: SIM115
    limit(limits)
    if limits["confined"]:
        filter_system_calls()
    session, process = Session(output), os.getpid()
    os.write(control, b'{"ready": true}\n')
    for line in requests:
        request = json.loads(line)
        error = session.run(request["code"], request["timeout_s"])
        with contextlib.suppress(OSError, ValueError):  # the code has closed it
            output.flush()
        if os.getpid() != process:  # a fork of the user's code came back here
            os._exit(0)
        os.write(control, json.dumps({"error": error}).encode() + b"\n")


if __name__ == "__main__":
    main()
