"""A home folder for `serve --install-service`, and readers of its files by the rules of systemd."""

from __future__ import annotations

import os
import re
import socket
import sys
from pathlib import Path

import pytest
from hypothesis import strategies as st
from mlx_gptoss_cli import install_service
from mlx_gptoss_cli.main import group

PYTHON = os.path.abspath(sys.executable)
UNIT = "systemd/user/mlx-gptoss.service"
HOSTILE = ["a b", "%n %%", "$HOME ${X} $$", "\"q\" 's'", "\\x41\\", ";", "", "é\U0001f999", "-", "#x", "a=b c"]
FAKE = """#!/bin/sh
echo "$(basename "$0") $*" >> "$CALLS"
case " $* " in *" ${FAIL:-none} "*) echo "no such bus" >&2; exit ${FAIL_CODE:-1};; esac
case "$1" in print) exit 113;; esac
"""


class Host:
    """A home folder, and systemctl and launchctl that record how they are called."""

    def __init__(self, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.home = folder / "home"
        self.config = folder / "config"
        self.calls_file = folder / "calls"
        self.agent = self.home / "Library/LaunchAgents/local.mlx-gptoss.serve.plist"
        self.unit = self.config / UNIT
        self.variables_file = self.config / "mlx-gptoss/service.env"
        self._monkeypatch = monkeypatch
        self.home.mkdir()
        (programs := folder / "bin").mkdir()
        for name in ("systemctl", "launchctl"):
            (programs / name).write_text(FAKE)
            (programs / name).chmod(0o755)
        for name in [name for name in os.environ if name.startswith("MLX_GPTOSS_")]:
            monkeypatch.delenv(name)
        for name in ("SUDO_USER", "FAIL"):
            monkeypatch.delenv(name, raising=False)
        for name, value in {
            "HOME": self.home,
            "XDG_CONFIG_HOME": self.config,
            "CALLS": self.calls_file,
            "PATH": f"{programs}:{os.environ['PATH']}",
        }.items():
            monkeypatch.setenv(name, str(value))
        with socket.create_server(("127.0.0.1", 0)) as free:
            self.port = free.getsockname()[1]

    def serve(self, *options: str, port: bool = True) -> None:
        words = ["serve", *options, *(["--port", str(self.port)] if port else [])]
        self._monkeypatch.setattr(sys, "argv", ["/anywhere/mlx_gptoss/__main__.py", *words])
        group.main(words, standalone_mode=False)

    def install(self, *options: str) -> None:
        self.serve("--install-service", "--backend", "mlx", *options)

    def calls(self) -> list[str]:
        lines = self.calls_file.read_text().splitlines() if self.calls_file.exists() else []
        self.calls_file.unlink(missing_ok=True)
        return lines

    def files(self) -> list[Path]:
        return [path for root in (self.home, self.config) for path in root.rglob("*") if path.is_file()]

    def words(self) -> list[str]:
        (line,) = re.findall("^ExecStart=(.*)$", self.unit.read_text(), re.MULTILINE)
        return parse_exec(line, {})

    def variables(self) -> dict[str, str]:
        return parse_env_file(self.variables_file.read_text())


def parse_exec(line: str, variables: dict[str, str]) -> list[str]:
    """The words of an ExecStart= line by the rules of systemd.service(5) and systemd.unit(5)."""
    escapes = {"a": "\a", "b": "\b", "f": "\f", "n": "\n", "r": "\r", "t": "\t", "v": "\v", "s": " "}
    words, word, quote, at = [], None, "", 0
    while at < len(line):
        character = line[at]
        at += 1
        if character == "\\":
            following = line[at]
            at += 1
            assert following in escapes or following in "\\\"'", f"an unknown escape: {following}"
            word = (word or "") + escapes.get(following, following)
        elif quote:
            quote, word = ("", word) if character == quote else (quote, (word or "") + character)
        elif character in "\"'":
            quote, word = character, word or ""
        elif character in " \t":
            words, word = [*words, *([word] if word is not None else [])], None
        else:
            word = (word or "") + character
    assert not quote
    words += [] if word is None else [word]

    def specifier(match: re.Match[str]) -> str:
        assert match[0] == "%%", f"a specifier: {match[0]}"
        return "%"

    def variable(match: re.Match[str]) -> str:
        return "$" if match[0] == "$$" else variables.get(match[1], "")

    unspecified = [re.sub("%.?", specifier, one) for one in words]
    return [unspecified[0], *(re.sub(r"\$\$|\$\{(\w+)\}|\$(\w+)", variable, one) for one in unspecified[1:])]


def parse_env_file(text: str) -> dict[str, str]:
    """The variables of an EnvironmentFile= by the rules of systemd.exec(5), for values in double quotes."""
    found = {}
    for line in text.splitlines():
        name, value = line.split("=", 1)
        assert re.fullmatch(r"[A-Za-z_]\w*", name, re.ASCII) and value[0] == value[-1] == '"'
        inner = value[1:-1]
        assert re.fullmatch(r'(\\["\\`$]|[^"\\])*', inner, re.DOTALL)
        found[name] = re.sub(r'\\(["\\`$])', r"\1", inner)
    return found


plain = st.text(st.characters(exclude_categories=("Cc", "Cs")).filter(install_service._is_plain))
