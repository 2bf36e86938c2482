"""Sandboxes for the tool python: the command that starts a confined Python, and which of them works here.

On Linux only the Python installation and the system's libraries are visible inside, read-only; /mnt/data and /tmp are
empty, in memory and limited; there is no network and no process of the host. On macOS a profile of sandbox-exec
refuses the network and files outside. The code has no privileges.
"""

from __future__ import annotations

import json
import os
import shlex
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path

from ...errors import GptOssError
from .settings import PythonSettings

DATA = "/mnt/data"  # the working folder inside a namespace
SYSTEM_FOLDERS = ("/usr", "/bin", "/sbin", "/lib", "/lib32", "/lib64")
SYSTEM_FILES = ("/etc/ld.so.cache", "/etc/alternatives", "/etc/localtime")
DEVICES = ("/dev/null", "/dev/zero", "/dev/full", "/dev/random", "/dev/urandom")
FIRST_UID, UIDS = 61184, 4096  # where the server is root, each session is another user; no account has these ids
PROBE_S = 30.0


@dataclass(frozen=True)
class Interpreter:
    """The Python that runs the code. path: its program. prefixes: the folders of its installation."""

    path: str
    prefixes: tuple[str, ...]


@dataclass(frozen=True)
class Sandbox:
    """One way to confine a session.

    name: of the settings. wrap: given a session's number, its folder on the host and a command, returns the command
    that runs it confined. has_data: whether the session's files are in /mnt/data, in memory; else in its folder.
    """

    name: str
    wrap: Callable[[int, str, Sequence[str]], list[str]]
    has_data: bool

    def command(
        self, settings: PythonSettings, interpreter: Interpreter, number: int, folder: str, control: int
    ) -> list[str]:
        """The command that runs the driver of session `number`. control: the descriptor on which it replies."""
        limits = {
            "memory": settings.memory_mb << 20,
            "file": settings.disk_mb << 20,
            "processes": settings.max_processes,
            "folder": DATA if self.has_data else folder,
            "confined": self.name != "none",
            "control": control,
        }
        driver = (files(__package__) / "python_driver.py").read_text("utf-8")
        return self.wrap(number, folder, [interpreter.path, "-I", "-u", "-c", driver, json.dumps(limits)])


def find_interpreter(settings: PythonSettings) -> Interpreter:
    """The interpreter of the settings. Raises GptOssError if it does not run."""
    path = settings.interpreter or sys.executable
    code = "import json, sys; print(json.dumps([sys.version_info[:2], sys.prefix, sys.base_prefix, sys.path]))"
    try:
        out = subprocess.run([path, "-I", "-c", code], capture_output=True, text=True, timeout=PROBE_S, check=True)
        version, prefix, base, search = json.loads(out.stdout)
    except (OSError, subprocess.SubprocessError, ValueError) as error:
        raise GptOssError(f"the tool python: the interpreter {path} does not run: {error}") from error
    if tuple(version) < (3, 10):
        raise GptOssError(f"the tool python: {path} is Python {version[0]}.{version[1]}; it needs 3.10 or later")
    packages = [folder for folder in search if Path(folder).name in ("site-packages", "dist-packages")]
    real = str(Path(path).resolve().parent.parent)
    return Interpreter(os.path.abspath(shutil.which(path) or path), tuple(_outermost([prefix, base, real, *packages])))


def find_sandbox(settings: PythonSettings, interpreter: Interpreter) -> Sandbox:
    """The sandbox of the settings, tried out. Raises GptOssError if it, or with "auto" every one, fails here."""
    made = {
        "bubblewrap": Sandbox("bubblewrap", lambda *a: bubblewrap(settings, interpreter, *a), True),
        "namespaces": Sandbox("namespaces", lambda *a: namespaces(settings, interpreter, *a), True),
        "sandbox-exec": Sandbox("sandbox-exec", lambda *a: sandbox_exec(interpreter, *a), False),
        "none": Sandbox("none", lambda number, folder, command: list(command), False),
    }
    automatic = ("sandbox-exec",) if sys.platform == "darwin" else ("bubblewrap", "namespaces")
    names = automatic if settings.sandbox == "auto" else (settings.sandbox,)
    failures = []
    for name in names:
        failure = _try_out(made[name], settings, interpreter)
        if failure is None:
            return made[name]
        failures.append(f"{name}: {failure}")
    advice = "install bubblewrap (bwrap), or " if sys.platform == "linux" else ""
    raise GptOssError(
        f"the tool python has no sandbox here ({'; '.join(failures)}): {advice}run the server where one works; "
        'sandbox = "none" in [python] runs code without any protection'
    )


def _try_out(sandbox: Sandbox, settings: PythonSettings, interpreter: Interpreter) -> str | None:
    """Start a session and end it. Returns what went wrong, or None."""
    import tempfile

    with tempfile.TemporaryDirectory() as folder:
        read, write = os.pipe()
        try:
            command = sandbox.command(settings, interpreter, 0, folder, write)
            ran = subprocess.run(
                command, stdin=subprocess.DEVNULL, capture_output=True, pass_fds=(write,), timeout=PROBE_S
            )
            os.close(write)
            write = -1
            if b"ready" in os.read(read, 100):
                return None
            text = ran.stderr.decode(errors="replace").strip() or ran.stdout.decode(errors="replace").strip()
            return " ".join(text[-300:].split()) or f"exit code {ran.returncode}"
        except (OSError, subprocess.SubprocessError) as error:
            return str(error)[:300]
        finally:
            os.close(read)
            if write >= 0:
                os.close(write)


def bubblewrap(
    settings: PythonSettings, interpreter: Interpreter, number: int, folder: str, command: Sequence[str]
) -> list[str]:
    """The command under bubblewrap."""
    words = ["bwrap", "--die-with-parent", "--new-session", "--unshare-pid", "--unshare-net", "--unshare-ipc"]
    words += ["--unshare-uts", "--unshare-cgroup-try"]
    words += [] if _is_root() else ["--unshare-user"]
    words += ["--proc", "/proc", "--dev", "/dev"]
    for target, mebibytes in (("/tmp", settings.disk_mb), (DATA, settings.disk_mb), ("/dev/shm", 16)):
        words += ["--size", str(mebibytes << 20), "--perms", "1777", "--tmpfs", target]
    for path in _visible(interpreter):
        for parent in reversed(Path(path).parents[:-1]):
            words += ["--dir", str(parent)]  # bubblewrap's own choice of a mode would let only its user in
        words += ["--symlink", os.readlink(path), path] if os.path.islink(path) else ["--ro-bind", path, path]
    words += ["--remount-ro", "/dev", "--remount-ro", "/", "--chdir", DATA, "--clearenv"]
    for name, value in _environment(DATA).items():
        words += ["--setenv", name, value]
    return [*words, "--", *_unprivileged(number), *command]


def namespaces(
    settings: PythonSettings, interpreter: Interpreter, number: int, folder: str, command: Sequence[str]
) -> list[str]:
    """The command under util-linux's unshare, mount and pivot_root. folder: becomes the mount point of the new root."""
    steps = ["set -e", f"cd {shlex.quote(folder)}", "mount -t tmpfs -o mode=755,size=1m,nosuid,nodev none .", "cd $PWD"]
    steps += ["mkdir -p proc dev old tmp mnt/data", "mount -t proc -o nosuid,nodev,noexec proc proc"]
    for target in ("tmp", "mnt/data"):
        steps.append(f"mount -t tmpfs -o mode=1777,size={settings.disk_mb}m,nosuid,nodev none {target}")
    for path in (*_visible(interpreter), *DEVICES):
        inside = shlex.quote(path.lstrip("/"))
        if os.path.islink(path):
            steps.append(f"ln -s {shlex.quote(os.readlink(path))} {inside}")
        elif os.path.isdir(path):
            steps += [f"mkdir -p {inside}", f"mount --rbind {shlex.quote(path)} {inside}"]
            steps.append(f"mount -o remount,bind,ro,nosuid,nodev {inside}")
        else:
            steps += [f"mkdir -p {shlex.quote(str(Path(path).parent).lstrip('/'))}", f"touch {inside}"]
            steps.append(f"mount --bind {shlex.quote(path)} {inside}")
    steps += [
        "pivot_root . old",
        "umount -l old",
        "rmdir old",
        "mount -o remount,bind,ro,nosuid,nodev /",
        f"cd {DATA}",
        'exec "$@"',
    ]
    words = ["setpriv", "--pdeathsig", "KILL", "unshare", "--mount", "--net", "--pid", "--ipc", "--uts", "--fork"]
    words += ["--kill-child=KILL", *([] if _is_root() else ["--user", "--map-root-user"])]
    script = "\n".join(steps)
    environment = [f"{name}={value}" for name, value in _environment(DATA).items()]
    confined = ["env", "-i", *environment, *_unprivileged(number, in_user_namespace=not _is_root()), *command]
    return [*words, "--", "sh", "-c", script, "sh", *confined]


def sandbox_exec(interpreter: Interpreter, number: int, folder: str, command: Sequence[str]) -> list[str]:
    """The command under macOS's sandbox-exec."""
    environment = [f"{name}={value}" for name, value in _environment(folder).items()]
    return ["sandbox-exec", "-p", mac_profile(interpreter, folder), "env", "-i", *environment, *command]


def mac_profile(interpreter: Interpreter, folder: str) -> str:
    """The profile for sandbox-exec: no network, files of the system and of Python to read, `folder` to write."""
    system = ("/usr/lib", "/usr/bin", "/bin", "/usr/share", "/System", "/Library/Frameworks", "/private/etc/localtime")
    read = [*system, "/private/var/db/dyld", "/dev", *interpreter.prefixes, os.path.realpath(folder)]
    lines = [
        "(version 1)",
        "(deny default)",
        "(allow process-fork)",
        "(allow process-exec)",
        "(allow signal (target same-sandbox))",
        "(allow sysctl-read)",
        "(allow file-read-metadata)",
        *(f"(allow file-read* (subpath {json.dumps(path)}))" for path in read),
        f"(allow file-write* (subpath {json.dumps(os.path.realpath(folder))}))",
        '(allow file-write-data (literal "/dev/null"))',
        "(deny network*)",
    ]
    return "\n".join(lines)


def _is_root() -> bool:
    return os.geteuid() == 0


def _unprivileged(number: int, in_user_namespace: bool = False) -> list[str]:
    """The words that drop privileges before a command, where the sandbox is set up with privileges."""
    drop = ["setpriv", "--no-new-privs", "--bounding-set=-all", "--inh-caps=-all"]
    if in_user_namespace:
        return drop
    uid = str(FIRST_UID + number % UIDS)
    return [*drop, f"--reuid={uid}", f"--regid={uid}", "--clear-groups"] if _is_root() else []


def _environment(folder: str) -> dict[str, str]:
    return {
        "PATH": "/usr/local/bin:/usr/bin:/bin",
        "HOME": folder,
        "TMPDIR": "/tmp" if folder == DATA else folder,
        "LANG": "C.UTF-8",
        "MPLBACKEND": "Agg",
        "OPENBLAS_NUM_THREADS": "4",
    }


def _visible(interpreter: Interpreter) -> Iterator[str]:
    """The paths that are visible inside, each before those within it."""
    yield from (path for path in (*SYSTEM_FOLDERS, *SYSTEM_FILES) if os.path.lexists(path))
    yield from (path for path in interpreter.prefixes if not path.startswith("/usr/") and path != "/usr")


def _outermost(paths: Sequence[str]) -> list[str]:
    """The paths without those that lie within another, and without the root."""
    sorted_paths = sorted({os.path.abspath(path) for path in paths if os.path.isdir(path)} - {"/"}, key=len)
    found: list[str] = []
    for path in sorted_paths:
        if not any(path == outer or path.startswith(f"{outer}/") for outer in found):
            found.append(path)
    return found
