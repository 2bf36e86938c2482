"""Python sessions: what they keep, what they print, their limits, and what the sandbox refuses."""

from __future__ import annotations

import asyncio
import os
import shutil
import signal
import subprocess
import sys
from dataclasses import replace

import psutil
import pytest

from mlx_gptoss.errors import GptOssError
from mlx_gptoss.server.hosted import sandbox
from mlx_gptoss.server.hosted.errors import ToolError
from mlx_gptoss.server.hosted.python_session import NO_OUTPUT, PythonSessions
from mlx_gptoss.server.hosted.settings import PythonSettings

SETTINGS = PythonSettings(timeout_s=20, memory_mb=600, disk_mb=16, max_processes=16)
CONFINED = ["sandbox-exec"] if sys.platform == "darwin" else ["bubblewrap", "namespaces"]
USES_MEMORY = "a = bytearray(150 << 20)\\nfor i in range(0, len(a), 4096): a[i] = 1\\nimport time; time.sleep(60)"


def available(name: str) -> str | None:
    """Why a sandbox cannot be used here; None if it can."""
    settings = replace(SETTINGS, sandbox=name)
    try:
        sandbox.find_sandbox(settings, sandbox.find_interpreter(settings))
    except GptOssError as error:
        return str(error)
    return None


@pytest.fixture(scope="module", params=CONFINED)
def confined(request: pytest.FixtureRequest) -> PythonSettings:
    """The settings of each sandbox of this system."""
    if (reason := available(request.param)) is not None:
        pytest.skip(reason)
    return replace(SETTINGS, sandbox=request.param)


def outputs(settings: PythonSettings, *codes: str) -> list:
    """The outputs of code that runs in one session, call after call."""

    async def work() -> list:
        sessions = PythonSessions(settings)
        try:
            id = sessions.new_session()
            return [await sessions.run(id, code) for code in codes]
        finally:
            await sessions.close()

    return asyncio.run(work())


def test_a_session_is_a_notebook(confined):
    codes = [
        "x = 41\nx + 1",
        "def f():\n    return x\n\nf()",
        "print('out'); import sys; print('err', file=sys.stderr)",
        "x = 1;",
        "1 / 0",
        "x = 2\nnot a program",
        "import asyncio\nawait asyncio.sleep(0.01)\n'awaited'",
        "!echo from the shell",
        "import os; os.system('echo from a process')",
        "open('note.txt', 'w').write('kept')",
        "open('/mnt/data/note.txt').read()" if sys.platform == "linux" else "open('note.txt').read()",
        "raise SystemExit(3)",
        "input()",
        "x",
    ]
    got = outputs(confined, *codes)
    texts = [one.text for one in got]
    assert texts[:4] == ["42", "41", "out\nerr", NO_OUTPUT]
    assert texts[4].startswith('Traceback (most recent call last):\n  File "<cell 5>", line 1, in <module>\n    1 / 0')
    assert got[4].error == "ZeroDivisionError: division by zero" and got[3].error is None
    assert "SyntaxError" in texts[5]
    assert texts[6:11] == ["'awaited'", "from the shell", "from a process\n0", "4", "'kept'"]
    assert got[11].error == "SystemExit: 3" and "EOFError" in texts[12] and texts[13] == "1"


def test_no_network(confined):
    codes = [
        "import socket; socket.create_connection(('1.1.1.1', 53), 3)",
        "import socket; socket.create_connection(('127.0.0.1', PORT), 3)",
        "import socket; socket.getaddrinfo('example.com', 80)",
        "import socket; socket.socket(40, socket.SOCK_STREAM)",
    ]
    import socket

    with socket.socket() as listener:  # of the host
        listener.bind(("127.0.0.1", 0))
        listener.listen()
        codes[1] = codes[1].replace("PORT", str(listener.getsockname()[1]))
        for output in outputs(confined, *codes):
            assert output.error is not None and "error" in output.error.lower(), output


def test_no_files_outside(confined, tmp_path):
    secret = tmp_path / "secret"
    secret.write_text("hunter2")
    codes = [
        f"open({str(secret)!r}).read()",
        f"open({str(tmp_path / 'new')!r}, 'w')",
        f"open({__file__!r}).read()",
        "open('/etc/passwd').read()",
        "open('/usr/lib/new', 'w')",
        "open('/new', 'w')",
        f"import shutil; shutil.rmtree({sys.prefix!r})",
        "import os; os.listdir('/proc/1/root/home')",
    ]
    for code, output in zip(codes, outputs(confined, *codes), strict=True):
        assert output.error is not None, (code, output)
        assert "hunter2" not in output.text
    assert secret.exists() and sorted(path.name for path in tmp_path.iterdir()) == ["secret"]
    assert os.path.exists(sys.prefix)


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_no_privileges_and_no_environment(confined, monkeypatch):
    monkeypatch.setenv("SECRET_KEY", "hunter2")
    status, calls, environment, processes = outputs(
        confined,
        "print(open('/proc/self/status').read())",
        "import ctypes, os\nlibc = ctypes.CDLL(None, use_errno=True)\n"
        "for call in (lambda: libc.unshare(0x10000000), lambda: libc.mount(b'none', b'/tmp', b'tmpfs', 0, None),\n"
        "             lambda: libc.memfd_create(b'x', 0), lambda: libc.ptrace(0, 0, 0, 0)):\n"
        "    print(call(), os.strerror(ctypes.get_errno()))",
        "import os; print(dict(os.environ))",
        "[one for one in os.listdir('/proc') if one.isdigit()]",
    )
    fields = dict(line.split(":\t") for line in status.text.splitlines() if ":\t" in line)
    assert {int(fields[name], 16) for name in ("CapEff", "CapPrm", "CapInh", "CapBnd")} <= {
        0,
        int(fields["CapBnd"], 16),
    }
    assert int(fields["CapEff"], 16) == int(fields["CapPrm"], 16) == 0
    assert fields["NoNewPrivs"] == "1" and fields["Seccomp"] == "2"
    assert calls.text.splitlines() == ["-1 Operation not permitted"] * 4
    assert "hunter2" not in environment.text
    assert len(processes.text.split(",")) <= 4


def test_an_endless_loop_keeps_the_variables(confined):
    _first, second, third = outputs(replace(confined, timeout_s=0.5), "x = 5", "while True: pass", "x")
    assert second.error == "timed out after 0.5 seconds" and "TimeoutError" in second.text
    assert third.text == "5"


def test_code_that_cannot_be_interrupted_is_killed(confined):
    ignore = "import signal; signal.signal(signal.SIGALRM, signal.SIG_IGN)\nwhile True: pass"
    _, second, third = outputs(replace(confined, timeout_s=0.5), "x = 5", ignore, "x")
    assert "could not be interrupted" in second.error and "its variables are lost" in second.text
    assert "NameError" in third.error


def test_a_memory_bomb_in_one_process(confined):
    bomb, after = outputs(confined, "pieces = []\nwhile True: pieces.append(bytearray(10 << 20))", "1 + 1")
    assert bomb.error is not None and ("MemoryError" in bomb.error or "MiB of memory" in bomb.error)
    assert after.text == "2"


def test_a_memory_bomb_in_many_processes(confined):
    code = (
        "import subprocess, sys, time\n"
        f"children = [subprocess.Popen([sys.executable, '-c', {USES_MEMORY!r}]) for _ in range(8)]\ntime.sleep(60)"
    ).replace("\\\\n", "\\n")
    bomb, after = outputs(replace(confined, timeout_s=60), code, "1 + 1")
    assert bomb.error == "the code used more than 600 MiB of memory"
    assert after.text == "2"


@pytest.mark.skipif(sys.platform != "linux", reason="macOS counts all processes of the user")
def test_a_fork_bomb(confined):
    bomb, after = outputs(replace(confined, memory_mb=4000), "import os\nwhile True: os.fork()", "1 + 1")
    assert "BlockingIOError" in (bomb.error or "") or "BlockingIOError" in bomb.text
    assert "2" in after.text.splitlines()


def test_huge_files(confined):
    code = "with open('big', 'wb') as file:\n    while True: file.write(bytes(1 << 20))"
    (output,) = outputs(confined, code)
    assert "OSError" in output.error


def test_huge_output(confined):
    long, endless, after = outputs(
        replace(confined, max_output_chars=1000), "print('a' * 5_000_000 + 'end')", "while True: print('b' * 1000)", "1"
    )
    assert len(long.text) < 1200 and long.text.startswith("aaa") and long.text.endswith("end")
    assert "5000004 bytes in all" in long.text
    assert "printed more than 64 MiB" in endless.error and len(endless.text) < 1300
    assert after.text == "1"


def test_closing_ends_all_processes(confined):
    async def work() -> None:
        sessions = PythonSessions(confined)
        id = sessions.new_session()
        await sessions.run(id, "import subprocess; child = subprocess.Popen(['sleep', '1000'])")
        assert len(psutil.Process().children(recursive=True)) >= 2
        await sessions.close()
        assert not sessions.exists(id)
        with pytest.raises(ToolError, match="has ended"):
            await sessions.run(id, "1")

    before = {one.pid for one in psutil.Process().children(recursive=True)}
    asyncio.run(work())
    assert {one.pid for one in psutil.Process().children(recursive=True)} <= before


def test_sessions_die_with_the_server(confined, tmp_path):
    """A server that is killed with SIGKILL leaves no process behind, not even one that is busy."""
    program = (
        "import asyncio, sys, pathlib\n"
        "from mlx_gptoss.server.hosted.python_session import PythonSessions\n"
        "from mlx_gptoss.server.hosted.settings import PythonSettings\n"
        "async def main():\n"
        f"    sessions = PythonSessions(PythonSettings(sandbox={confined.sandbox!r}))\n"
        "    id = sessions.new_session()\n"
        "    await sessions.run(id, \"import subprocess; child = subprocess.Popen(['sleep', '1000'])\")\n"
        "    task = asyncio.ensure_future(sessions.run(id, 'while True: pass'))\n"
        "    await asyncio.sleep(0.3)\n"
        "    print('running', flush=True)\n"
        "    await task\n"
        "asyncio.run(main())\n"
    )
    server = subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, text=True)
    assert server.stdout is not None and server.stdout.readline() == "running\n"
    tree = psutil.Process(server.pid).children(recursive=True)
    assert len(tree) >= 2
    os.kill(server.pid, signal.SIGKILL)
    server.wait()
    server.stdout.close()
    _, alive = psutil.wait_procs(tree, timeout=20)
    assert not alive


def test_a_cancelled_call_ends_its_process():
    async def work() -> None:
        sessions = PythonSessions(replace(SETTINGS, sandbox="none"))
        id = sessions.new_session()
        await sessions.run(id, "x = 1")
        task = asyncio.ensure_future(sessions.run(id, "while True: pass"))
        await asyncio.sleep(0.2)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert "NameError" in (await sessions.run(id, "x")).error
        await sessions.close()

    asyncio.run(work())


def test_at_most_max_sessions_run(tmp_path):
    async def work() -> None:
        sessions = PythonSessions(replace(SETTINGS, sandbox="none", max_sessions=2, timeout_s=60))
        first, *others = (sessions.new_session() for _ in range(3))
        await sessions.run(first, "x = 1")
        code = f"import time; open({str(tmp_path)!r} + '/%d', 'w'); time.sleep(60)"
        busy = [asyncio.ensure_future(sessions.run(id, code % number)) for number, id in enumerate(others)]
        while len(list(tmp_path.iterdir())) < 2:
            await asyncio.sleep(0.01)
        assert not sessions.exists(first)  # it was idle, and its place was needed
        with pytest.raises(ToolError, match="all 2 python sessions are busy"):
            await sessions.run(sessions.new_session(), "1")
        for task in busy:
            task.cancel()
        await asyncio.gather(*busy, return_exceptions=True)
        await sessions.close()

    asyncio.run(work())


def test_idle_sessions_end():
    async def work() -> None:
        sessions = PythonSessions(replace(SETTINGS, sandbox="none", idle_s=0.2))
        id = sessions.new_session()
        await sessions.run(id, "1")
        children = psutil.Process().children(recursive=True)
        while sessions.exists(id):
            await asyncio.sleep(0.01)
        await sessions.close()
        assert not psutil.wait_procs(children, timeout=20)[1]

    asyncio.run(work())


def test_no_sandbox_is_an_error(monkeypatch):
    monkeypatch.setattr(shutil, "which", lambda name: None)
    monkeypatch.setattr(sandbox, "bubblewrap", lambda *a: ["/nonexistent/bwrap"])
    monkeypatch.setattr(sandbox, "namespaces", lambda *a: ["sh", "-c", "echo unshare: not permitted >&2; exit 1"])
    monkeypatch.setattr(sandbox, "sandbox_exec", lambda *a: ["/nonexistent/sandbox-exec"])
    with pytest.raises(GptOssError, match=r'no sandbox here .*nonexistent.* sandbox = "none"'):
        PythonSessions(SETTINGS)


def test_an_interpreter_that_does_not_run():
    with pytest.raises(GptOssError, match="/nonexistent/python does not run"):
        PythonSessions(replace(SETTINGS, interpreter="/nonexistent/python"))


def test_the_description_says_what_is_true():
    from mlx_gptoss.harmony.builtin import BUILTIN_TOOLS

    trained = BUILTIN_TOOLS["python"].description
    bare = PythonSessions(replace(SETTINGS, sandbox="none")).describe(trained)
    assert "20.0 seconds" in bare and "The working directory can be used" in bare and "UNKNOWN" in bare
    if (reason := available(CONFINED[0])) is not None:
        pytest.skip(reason)
    confined = PythonSessions(replace(SETTINGS, sandbox=CONFINED[0], timeout_s=120)).describe(trained)
    assert confined.endswith("Internet access for this session is disabled.") and "120.0 seconds" in confined


def test_the_profile_for_macos():
    text = sandbox.mac_profile(sandbox.Interpreter("/opt/py/bin/python3", ("/opt/py",)), "/tmp")
    assert "(deny default)" in text and "(deny network*)" in text
    assert '(allow file-read* (subpath "/opt/py"))' in text
    writable = [line for line in text.splitlines() if "file-write*" in line]
    assert writable == [f'(allow file-write* (subpath "{os.path.realpath("/tmp")}"))']


def test_the_memory_of_a_tree_of_processes():
    from mlx_gptoss.server.hosted.processes import _by_ps, memory_of_tree

    code = "import subprocess, sys\nchild = subprocess.Popen([sys.executable, '-c', sys.argv[1]])\nchild.wait()"
    grandchild = "a = b'x' * (100 << 20)\nprint('ready', flush=True)\nimport time; time.sleep(60)"
    with subprocess.Popen([sys.executable, "-c", code, grandchild], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None and process.stdout.readline() == "ready\n"
        measured = [memory_of_tree(process.pid)]
        measured += [_by_ps(process.pid)] if shutil.which("ps") else []
        for one in psutil.Process(process.pid).children(recursive=True):
            one.kill()
        process.kill()
    assert all(100 << 20 <= one < 400 << 20 for one in measured)
