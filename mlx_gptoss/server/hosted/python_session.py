"""The tool python: sessions that keep their variables from call to call, each a confined process (sandbox.py)."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import secrets
import shutil
import signal
import tempfile
from collections import OrderedDict
from dataclasses import dataclass

from .errors import ToolError
from .processes import memory_of_tree
from .sandbox import Interpreter, Sandbox, find_interpreter, find_sandbox
from .settings import PythonSettings

START_S = 30.0
GRACE_S = 2.0  # after the time limit, for the session to interrupt the code itself; then it is killed
WATCH_S = 0.25  # how often the memory is looked at
MAX_OUTPUT_BYTES = 64 << 20  # a call that prints more is ended
MAX_REPLY_BYTES = 1 << 20
MAX_IDS = 1000  # sessions that exist but have no process
MAX_CODE_CHARS = 1 << 20
NO_OUTPUT = "[no output; print() what you want to see]"


@dataclass(frozen=True)
class Output:
    """What a call printed, cut to the limit, and the error that ended it."""

    text: str
    error: str | None = None


class PythonSessions:
    """The sessions of one server, by id. Raises GptOssError if no sandbox works here."""

    def __init__(self, settings: PythonSettings) -> None:
        self._settings = settings
        self._interpreter: Interpreter = find_interpreter(settings)
        self.sandbox: Sandbox = find_sandbox(settings, self._interpreter)
        self._sessions: OrderedDict[str, _Session] = OrderedDict()  # the least recently used first
        self._ending: set[asyncio.Task[None]] = set()
        self._count = 0

    def describe(self, text: str) -> str:
        """The tool's description for the model, with what is true of these sessions."""
        text = text.replace("120.0", f"{self._settings.timeout_s:.1f}")
        if not self.sandbox.has_data:
            text = text.replace("The drive at '/mnt/data'", "The working directory")
        if self.sandbox.name != "none":
            text = text.replace("is UNKNOWN. Depends on the cluster.", "is disabled.")
        return text

    def exists(self, id: str) -> bool:
        """Whether the session has not ended."""
        return id in self._sessions

    def new_session(self) -> str:
        """The id of a new session. Its process starts with the first call."""
        id = f"cntr_{secrets.token_hex(16)}"
        self._count += 1
        self._sessions[id] = _Session(self._settings, self._interpreter, self.sandbox, self._count)
        for old in [key for key, one in self._sessions.items() if one.process is None and not one.lock.locked()]:
            if len(self._sessions) <= MAX_IDS:
                break
            del self._sessions[old]
        return id

    async def run(self, id: str, code: str) -> Output:
        """Run code in a session, and return what it printed. A cancelled call ends the session's process.

        Raises ToolError if the session has ended, or cannot start because too many are busy.
        """
        session = self._sessions.get(id)
        if session is None:
            raise ToolError("the session has ended")
        if len(code) > MAX_CODE_CHARS:
            raise ToolError(f"the code has more than {MAX_CODE_CHARS} characters")
        async with session.lock:
            self._sessions.move_to_end(id)
            if session.process is None:
                await self._make_room()
            try:
                return await session.run(code)
            finally:
                self._end_when_idle(id, session)

    async def _make_room(self) -> None:
        """End the least recently used session if as many run as may."""
        while True:
            running = [(id, one) for id, one in self._sessions.items() if one.process is not None]
            if len(running) < self._settings.max_sessions:
                return
            idle = [(id, one) for id, one in running if not one.lock.locked()]
            if not idle:
                raise ToolError(f"all {len(running)} python sessions are busy; try again later")
            await self._end(*idle[0])

    def _end_when_idle(self, id: str, session: _Session) -> None:
        def end() -> None:
            if not session.lock.locked():
                ending = asyncio.create_task(self._end(id, session))
                self._ending.add(ending)
                ending.add_done_callback(self._ending.discard)

        if session.timer is not None:
            session.timer.cancel()
        session.timer = asyncio.get_running_loop().call_later(self._settings.idle_s, end)

    async def _end(self, id: str, session: _Session) -> None:
        self._sessions.pop(id, None)
        await session.end()

    async def close(self) -> None:
        """End all sessions, and wait for those that are ending."""
        sessions = list(self._sessions.items())
        await asyncio.gather(*(self._end(id, session) for id, session in sessions), *self._ending)


class _Session:
    """One session. process: None before the first call and after the process has ended."""

    def __init__(self, settings: PythonSettings, interpreter: Interpreter, sandbox: Sandbox, number: int) -> None:
        self._settings, self._interpreter, self._sandbox, self._number = settings, interpreter, sandbox, number
        self.lock = asyncio.Lock()
        self.process: _Process | None = None
        self.timer: asyncio.TimerHandle | None = None

    async def run(self, code: str) -> Output:
        """Run code. The process ends with a call that is cancelled, or that breaks a limit it cannot recover from."""
        if self.process is not None and self.process.ended:
            await self._drop()
        try:
            if self.process is None:
                self.process = _Process(self._settings)
                await self.process.start(self._sandbox, self._interpreter, self._number)
            output = await self.process.run(code)
        except BaseException:
            await self._drop()
            raise
        if self.process.ended:
            await self._drop()
        return output

    async def end(self) -> None:
        """End the process."""
        if self.timer is not None:
            self.timer.cancel()
        await self._drop()

    async def _drop(self) -> None:
        process, self.process = self.process, None
        if process is not None:
            await asyncio.shield(asyncio.ensure_future(process.end()))


class _Process:
    """A running driver (python_driver.py), with the pipes of its requests, its replies and its output.

    ended: why it ended, for the model; None while it runs.
    """

    def __init__(self, settings: PythonSettings) -> None:
        self.ended: str | None = None
        self._settings = settings
        self._folder = tempfile.mkdtemp(prefix="mlx-gptoss-python-")
        self._process: asyncio.subprocess.Process | None = None
        self._control = self._output = -1  # the ends of the pipes that are read here
        self._replies = b""
        self._printed = _Buffer(settings.max_output_chars)
        self._event = asyncio.Event()  # there is a reply, or the process has ended
        self._watcher: asyncio.Task[None] | None = None

    async def start(self, sandbox: Sandbox, interpreter: Interpreter, number: int) -> None:
        """Start the driver. Raises ToolError if it does not start."""
        self._control, control = os.pipe()
        self._output, output = os.pipe()
        try:
            self._process = await asyncio.create_subprocess_exec(
                *sandbox.command(self._settings, interpreter, number, self._folder, control),
                stdin=asyncio.subprocess.PIPE,
                stdout=output,
                stderr=asyncio.subprocess.STDOUT,
                pass_fds=(control,),
                start_new_session=True,
                cwd=self._folder,
                limit=MAX_REPLY_BYTES,
            )
        finally:
            os.close(control)
            os.close(output)
        loop = asyncio.get_running_loop()
        for end, read in ((self._control, self._read_control), (self._output, self._read_output)):
            os.set_blocking(end, False)
            loop.add_reader(end, read)
        if await self._reply(START_S) is None:
            raise ToolError(f"the python session did not start: {self._printed.text().strip()[-300:]}")
        self._watcher = asyncio.ensure_future(self._watch())

    async def run(self, code: str) -> Output:
        """Run code, and return what it printed until it was done, or until it was ended."""
        assert self._process is not None and self._process.stdin is not None
        limit = self._settings.timeout_s
        self._printed = _Buffer(self._settings.max_output_chars)
        with contextlib.suppress(ConnectionError):
            self._process.stdin.write(json.dumps({"code": code, "timeout_s": limit}).encode() + b"\n")
            await self._process.stdin.drain()
        reply = await self._reply(limit + GRACE_S)
        if reply is None and self.ended is None:
            self._kill(f"the code ran for more than {limit:g} seconds and could not be interrupted")
        while self.ended is None and self._read_output():
            pass
        text, error = self._printed.text(), None if reply is None else reply.get("error")
        if self.ended is not None:
            error = self.ended
            text += f"\n[{error}; the session was ended, and its variables are lost]"
        error = error if error is None or isinstance(error, str) else "error"
        return Output(text.strip("\n") or NO_OUTPUT, error)

    async def end(self) -> None:
        """Kill the process, wait for it, and remove its files."""
        self._kill("the session has ended")
        if self._watcher is not None:
            self._watcher.cancel()
        loop = asyncio.get_running_loop()
        for end in (self._control, self._output):
            if end >= 0:
                loop.remove_reader(end)
                os.close(end)
        self._control = self._output = -1
        if self._process is not None:
            await self._process.wait()
        await asyncio.to_thread(shutil.rmtree, self._folder, True)

    async def _reply(self, timeout_s: float) -> dict[str, object] | None:
        """The next reply; None if the process ends or the time is up first."""
        deadline = asyncio.get_running_loop().time() + timeout_s
        while b"\n" not in self._replies:
            left = deadline - asyncio.get_running_loop().time()
            if self.ended is not None or left <= 0:
                return None
            with contextlib.suppress(asyncio.TimeoutError):
                await asyncio.wait_for(self._event.wait(), left)
            self._event.clear()
        line, _, self._replies = self._replies.partition(b"\n")
        try:
            reply = json.loads(line)
        except (ValueError, RecursionError):
            reply = {"error": "the session sent a reply of its own"}
        return reply if isinstance(reply, dict) else {}

    def _read_control(self) -> None:
        data = self._read(self._control)
        if data:
            self._replies += data
            if len(self._replies) > MAX_REPLY_BYTES:
                self._kill("the session sent too long a reply")
        elif data is not None:
            self._kill("the python process has ended")
        self._event.set()

    def _read_output(self) -> bool:
        """Read what was printed. Returns whether there was something."""
        data = self._read(self._output)
        if data:
            self._printed.add(data)
            if self._printed.total > MAX_OUTPUT_BYTES:
                self._kill(f"the code printed more than {MAX_OUTPUT_BYTES >> 20} MiB")
        elif data is not None and self._output >= 0:
            asyncio.get_running_loop().remove_reader(self._output)
        return bool(data)

    def _read(self, end: int) -> bytes | None:
        """What can be read now; None if there is nothing, empty at the end."""
        if end < 0:
            return None
        try:
            return os.read(end, 1 << 16)
        except BlockingIOError:
            return None

    async def _watch(self) -> None:
        """Kill the process when its memory, with that of its children, exceeds the limit."""
        assert self._process is not None
        while self.ended is None:
            used = await asyncio.to_thread(memory_of_tree, self._process.pid)
            if used > self._settings.memory_mb << 20:
                self._kill(f"the code used more than {self._settings.memory_mb} MiB of memory")
            await asyncio.sleep(WATCH_S)

    def _kill(self, reason: str) -> None:
        """Kill the process and everything that it has started."""
        if self.ended is None:
            self.ended = reason
            if self._control >= 0:
                asyncio.get_running_loop().remove_reader(self._control)
            if self._process is not None and self._process.returncode is None:
                with contextlib.suppress(ProcessLookupError, PermissionError):
                    os.killpg(self._process.pid, signal.SIGKILL)
        self._event.set()


class _Buffer:
    """The beginning and the end of an output. limit: characters of it to keep. total: its bytes."""

    def __init__(self, limit: int) -> None:
        self.total = 0
        self._limit = limit
        self._head = self._tail = b""

    def add(self, data: bytes) -> None:
        """Append data."""
        self.total += len(data)
        room = 4 * self._limit - len(self._head)
        self._head += data[: max(room, 0)]
        self._tail = (self._tail + data[max(room, 0) :])[-4 * self._limit :]

    def text(self) -> str:
        """The output as text; where it is too long, with a note in place of its middle."""
        text = (self._head + self._tail).decode(errors="replace")
        if len(text) <= self._limit:
            return text
        half = self._limit // 2
        return f"{text[:half]}\n[... {self.total} bytes in all, the middle is left out ...]\n{text[-half:]}"
