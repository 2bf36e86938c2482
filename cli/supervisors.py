"""What keeps the service of `serve --install-service` running: systemd or launchd, their files and their calls."""

from __future__ import annotations

import getpass
import os
import re
import shlex
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from mlx_gptoss.errors import GptOssError

NAME = "mlx-gptoss"
UNIT = "mlx-gptoss.service"
LABEL = "local.mlx-gptoss.serve"
LAUNCHD = "MLX_GPTOSS_LAUNCHD"  # set for a LaunchAgent: cli/main.py then ends with 0 after a usage error
CALL_TIMEOUT_S = 120.0  # of systemctl and launchctl, which wait until the service has stopped


@dataclass(frozen=True)
class Command:
    """What the service runs. words: program and arguments. environment: its variables.

    stop_s: seconds from SIGTERM to SIGKILL. hardened: whether it may be kept from gaining privileges.
    """

    words: tuple[str, ...]
    environment: Mapping[str, str]
    stop_s: int
    hardened: bool = True


@dataclass(frozen=True)
class Step:
    """One call of systemctl or launchctl. accepted: its good exit codes. wait_s: how long to repeat it until then."""

    words: tuple[str, ...]
    accepted: tuple[int, ...] = (0,)
    wait_s: float = 0.0


class Supervisor(Protocol):
    """What keeps the service running: systemd or launchd.

    program: its command. unit: the file that defines the service. other_files: what that file refers to. start: the
    calls that start the service, or restart it with a new definition. stop: those that stop it and end its start at
    login. cleanup: those to make once the files are removed. logs: the command that shows the logs. note: more for the
    user to know.
    """

    program: str
    unit: Path
    other_files: tuple[Path, ...]
    start: tuple[Step, ...]
    stop: tuple[Step, ...]
    cleanup: tuple[Step, ...]
    logs: str
    note: str

    def render(self, command: Command) -> dict[Path, bytes]:
        """The contents of the files, in the order to write them."""
        ...


class Systemd:
    """A systemd user unit. Its environment variables are in a separate file with mode 0600."""

    program = "systemctl"
    logs = f"journalctl --user -u {NAME} -f"
    start: tuple[Step, ...] = (
        Step(("systemctl", "--user", "daemon-reload")),
        Step(("systemctl", "--user", "enable", UNIT)),
        Step(("systemctl", "--user", "reset-failed", UNIT), (0, 1)),  # 1: no such unit so far
        Step(("systemctl", "--user", "restart", UNIT)),
    )
    stop: tuple[Step, ...] = (Step(("systemctl", "--user", "disable", "--now", UNIT)),)
    cleanup: tuple[Step, ...] = (Step(("systemctl", "--user", "daemon-reload")),)

    def __init__(self) -> None:
        configured = os.environ.get("XDG_CONFIG_HOME", "")
        config = Path(configured) if os.path.isabs(configured) else Path.home() / ".config"
        self.unit = config / "systemd" / "user" / UNIT
        self.variables = config / NAME / "service.env"
        self.other_files: tuple[Path, ...] = (self.variables,)
        lingers = Path("/var/lib/systemd/linger", getpass.getuser()).exists()
        self.note = "" if lingers else "It ends when you log out, unless you run: loginctl enable-linger"

    def render(self, command: Command) -> dict[Path, bytes]:
        """The file of variables, then the unit."""
        variables = "".join(f"{name}={env_file_quoted(value)}\n" for name, value in command.environment.items())
        return {self.variables: variables.encode(), self.unit: self._unit(command).encode()}

    def _unit(self, command: Command) -> str:
        program, *arguments = command.words
        if "$" in program:  # systemd expands it in the arguments only, where $$ stands for it
            raise GptOssError(f"systemd cannot start {program}, whose path has a $")
        words = (exec_quoted(program, dollar="$"), *map(exec_quoted, arguments))
        # A setuid helper, as some systems have for the sandbox of --tools python, needs its privileges. PrivateTmp and
        # its like need user namespaces, which not every system allows, and MemoryDenyWriteExecute breaks Triton.
        hardening = "NoNewPrivileges=yes\nLockPersonality=yes\nRestrictSUIDSGID=yes\n" if command.hardened else ""
        return f"""\
# Written by: {NAME} serve --install-service
[Unit]
Description=mlx-gptoss: OpenAI's gpt-oss models over HTTP
StartLimitIntervalSec=300
StartLimitBurst=5

[Service]
Type=exec
ExecStart={" ".join(words)}
EnvironmentFile={str(self.variables).replace("%", "%%")}
Restart=on-failure
RestartSec=5
# A usage error does not go away by itself.
RestartPreventExitStatus=2
# The first SIGTERM drains the server. Only the main process gets it: it ends the others when it has finished.
KillSignal=SIGTERM
KillMode=mixed
TimeoutStopSec={command.stop_s}
# When the kernel kills the process of one model for its memory, the others go on.
OOMPolicy=continue
{hardening}
[Install]
WantedBy=default.target
"""


class Launchd:
    """A LaunchAgent, in a file with mode 0600."""

    program = "launchctl"
    other_files: tuple[Path, ...] = ()
    cleanup: tuple[Step, ...] = ()
    note = "It ends when you log out, and starts again at the next login."

    def __init__(self) -> None:
        self.unit = Path.home() / "Library" / "LaunchAgents" / f"{LABEL}.plist"
        self.log = Path.home() / "Library" / "Logs" / f"{NAME}.log"
        self.logs = f"tail -f {shlex.quote(str(self.log))}"
        domain = f"gui/{os.getuid()}"
        service = f"{domain}/{LABEL}"
        self.stop: tuple[Step, ...] = (  # 3, 36, 113: not there, in progress, unknown
            Step(("launchctl", "bootout", service), (0, 3, 36, 113)),
            Step(("launchctl", "print", service), (113,), CALL_TIMEOUT_S),
        )
        self.start: tuple[Step, ...] = (
            *self.stop,
            Step(("launchctl", "enable", service)),
            Step(("launchctl", "bootstrap", domain, str(self.unit))),
        )

    def render(self, command: Command) -> dict[Path, bytes]:
        """The property list."""
        import plistlib

        agent = {
            "Label": LABEL,
            "ProgramArguments": list(command.words),
            "EnvironmentVariables": {**command.environment, LAUNCHD: "1"},
            "WorkingDirectory": str(Path.home()),
            "RunAtLoad": True,
            "KeepAlive": {"SuccessfulExit": False},
            "ThrottleInterval": 30,
            "ExitTimeOut": command.stop_s,
            "ProcessType": "Interactive",  # launchd slows down the CPU and disk use of others
            "StandardOutPath": str(self.log),
            "StandardErrorPath": str(self.log),
        }
        return {self.unit: plistlib.dumps(agent, sort_keys=False)}


def exec_quoted(word: str, dollar: str = "$$") -> str:
    """A word of ExecStart=, quoted where it must be: systemd.service(5), "Command lines". dollar: stands for a $."""
    if re.fullmatch(r"[\w@+=:,./-]+", word, re.ASCII):
        return word
    escaped = word.replace("\\", "\\\\").replace('"', '\\"').replace("%", "%%").replace("$", dollar)
    return f'"{escaped}"'


def env_file_quoted(value: str) -> str:
    """A value of an EnvironmentFile= in double quotes: systemd.exec(5). Nothing is expanded in it."""
    for character in '\\"`$':
        value = value.replace(character, "\\" + character)
    return f'"{value}"'
