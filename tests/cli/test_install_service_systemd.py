"""The systemd unit: parsed back by its rules and by systemd itself, and run by one (slow)."""

from __future__ import annotations

import os
import shlex
import shutil
import socket
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from mlx_gptoss_cli.supervisors import env_file_quoted, exec_quoted
from service_host import HOSTILE, parse_env_file, parse_exec, plain

pytest.importorskip("uvicorn", reason="needs the serve extra")


@given(st.lists(plain))
def test_words_of_exec_start_are_parsed_back(words):
    line = " ".join(["/bin/x", *map(exec_quoted, words)])
    assert parse_exec(line, {"HOME": "/root", "X": "1"}) == ["/bin/x", *words]


@given(plain)
def test_values_of_an_environment_file_are_parsed_back(value):
    assert parse_env_file(f"X={env_file_quoted(value)}") == {"X": value}


def systemd(folder: Path) -> Path:
    """The program of systemd's user manager. Skips where there is none."""
    found = [path for path in map(Path, ("/lib/systemd/systemd", "/usr/lib/systemd/systemd")) if path.exists()]
    if not found or shutil.which("systemd-analyze") is None:
        pytest.skip("needs systemd")
    folder.mkdir(mode=0o700)
    return found[0]


def test_systemd_reads_the_unit_without_a_complaint(host, tmp_path, monkeypatch):
    systemd(tmp_path / "run")
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path / "run"))
    host.install(*(word for value in HOSTILE for word in ("--cors", value)))
    done = subprocess.run(["systemd-analyze", "verify", "--user", host.unit], capture_output=True, text=True)
    if "Failed to initialize manager" in done.stderr:
        pytest.skip(f"systemd-analyze does not run here: {done.stderr.strip()}")
    assert (done.returncode, done.stderr) == (0, "")


def test_systemd_parses_the_words_back(host, tmp_path):
    """systemd's own parser: its user manager, in test mode, dumps what it has read. It refuses to do so as root."""
    program = systemd(tmp_path / "run")
    host.install(*(word for value in HOSTILE for word in ("--cors", value)))
    with tempfile.TemporaryDirectory() as folder:
        units, run = Path(folder, "systemd/user"), Path(folder, "run")
        for path in (units / "default.target.wants", run):
            path.mkdir(parents=True, mode=0o700)
        shutil.copy(host.unit, units)
        (units / "default.target.wants" / host.unit.name).symlink_to(units / host.unit.name)
        here = {**os.environ, "HOME": folder, "XDG_CONFIG_HOME": folder, "XDG_RUNTIME_DIR": str(run)}
        user = {}
        if os.geteuid() == 0:
            user = {"user": 65534, "group": 65534, "extra_groups": []}
            for path in (Path(folder), *Path(folder).rglob("*")):
                os.chown(path, 65534, 65534, follow_symlinks=False)
        done = subprocess.run([program, "--user", "--test"], env=here, capture_output=True, text=True, **user)
    lines = [line for line in done.stdout.splitlines() if "Command Line:" in line and "mlx_gptoss_cli" in line]
    if not lines:
        pytest.skip(f"systemd's test mode does not run here: {(done.stderr or done.stdout)[-300:]}")
    shown = lines[0].split("Command Line: ", 1)[1].replace("\\$", "$").replace("\\`", "`")  # quoted for a shell
    words = [word.replace("$$", "$") for word in shlex.split(shown)]  # $$ is $ only when the command is run
    assert words == host.words()


@pytest.mark.slow
def test_under_a_real_systemd(tmp_path):
    """Started, restarted after kill -9, not restarted after a usage error, stopped and removed: in a mount and a
    process namespace of its own."""
    program = systemd(tmp_path / "run")
    if os.geteuid() != 0 or Path("/run/systemd/system").exists() or shutil.which("unshare") is None:
        pytest.skip("needs root and unshare, on a machine that systemd does not run")
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    script = UNDER_SYSTEMD.format(folder=tmp_path, systemd=program, python=sys.executable, port=port)
    words = ["unshare", "--mount", "--pid", "--fork", "--mount-proc", "--kill-child", "bash", "-c", script]
    done = subprocess.run(words, capture_output=True, text=True, timeout=300)
    if "no user manager" in done.stdout:
        pytest.skip(f"systemd's user manager does not run here: {done.stdout}")
    states = [line for line in done.stdout.splitlines() if line.startswith("state ")]
    assert states == [
        "state running active/0 200",
        "state crashed active/1 200",
        "state misused failed/0 none",
        "state again active/0 200",
        "state removed inactive/0 none",
    ], done.stdout + done.stderr


UNDER_SYSTEMD = """
mount -t tmpfs none /run && mkdir -p /run/systemd/system {folder}/home
export HOME={folder}/home XDG_RUNTIME_DIR={folder}/run XDG_CONFIG_HOME={folder}/home/.config
unset SUDO_USER
{systemd} --user --log-target=console > {folder}/log 2>&1 &
for try in $(seq 50); do systemctl --user list-units > /dev/null 2>&1 && break; sleep 0.2; done
systemctl --user list-units > /dev/null 2>&1 || {{ echo no user manager; tail -3 {folder}/log; exit; }}
health() {{ python3 -c "
import sys, time, urllib.request
for attempt in range(int(sys.argv[1])):
    try:
        print(urllib.request.urlopen('http://127.0.0.1:{port}/health', timeout=5).status)
        break
    except OSError:
        time.sleep(0.2)
else:
    print('none')" $1; }}
value() {{ systemctl --user show mlx-gptoss -p $1 --value; }}
state() {{ answer=$(health $2); echo state $1 $(value ActiveState)/$(value NRestarts) $answer; }}
serve="{python} -m mlx_gptoss_cli serve"
$serve --install-service --port {port} --backend mlx
state running 300
kill -9 $(value MainPID)
for try in $(seq 300); do [ $(value NRestarts) = 1 ] && break; sleep 0.2; done
state crashed 300
sed -i s/--port={port}/--port=x/ $XDG_CONFIG_HOME/systemd/user/mlx-gptoss.service
systemctl --user daemon-reload
systemctl --user restart mlx-gptoss
for try in $(seq 300); do [ $(value ActiveState) = failed ] && break; sleep 0.2; done
sleep 7  # longer than RestartSec
state misused 1
$serve --install-service --port {port} --backend mlx
state again 300
$serve --remove-service
state removed 1
systemctl --user exit
"""
