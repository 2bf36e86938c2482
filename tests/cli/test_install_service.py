"""serve --install-service and --remove-service: files parsed back as systemd and launchd read them, and their calls
recorded by programs of the same names. One slow test runs the unit under a systemd of its own."""

from __future__ import annotations

import os
import plistlib
import re
import shlex
import shutil
import socket
import stat
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from mlx_gptoss_cli import install_service
from mlx_gptoss_cli.main import group, main
from mlx_gptoss_cli.supervisors import Command, Launchd, env_file_quoted, exec_quoted

from mlx_gptoss.errors import GptOssError

pytest.importorskip("uvicorn", reason="needs the serve extra")

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


@pytest.fixture
def host(tmp_path, monkeypatch) -> Host:
    monkeypatch.setattr(sys, "platform", "linux")
    return Host(tmp_path, monkeypatch)


@pytest.fixture
def mac(host, monkeypatch) -> Host:
    monkeypatch.setattr(sys, "platform", "darwin")
    return host


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


@given(st.lists(plain))
def test_words_of_exec_start_are_parsed_back(words):
    line = " ".join(["/bin/x", *map(exec_quoted, words)])
    assert parse_exec(line, {"HOME": "/root", "X": "1"}) == ["/bin/x", *words]


@given(plain)
def test_values_of_an_environment_file_are_parsed_back(value):
    assert parse_env_file(f"X={env_file_quoted(value)}") == {"X": value}


@given(st.lists(plain), plain)
def test_a_property_list_is_parsed_back(words, value):
    (data,) = Launchd().render(Command(("/bin/x", *words), {"X": value}, 45)).values()
    agent = plistlib.loads(data)
    assert agent["ProgramArguments"] == ["/bin/x", *words]
    assert agent["EnvironmentVariables"]["X"] == value


def test_the_unit_runs_the_command_with_its_options(host, capsys, monkeypatch):
    monkeypatch.setenv("HF_HOME", "/models")
    monkeypatch.setenv("MLX_GPTOSS_SLOTS", "7")
    monkeypatch.setenv("UNRELATED", "1")
    origins = [word for value in HOSTILE for word in ("--cors", value)]
    host.install("--prefix-cache", "100", "--strict-model", *origins)
    shown = [f"--cors={value}" for value in HOSTILE]
    program = [PYTHON, "-m", "mlx_gptoss_cli", "serve"]
    options = ["--backend=mlx", "--prefix-cache=100", "--strict-model", *shown, f"--port={host.port}"]
    assert sorted(host.words()) == sorted([*program, *options]) and host.words()[:4] == program
    variables = host.variables()
    assert variables["HF_HOME"] == "/models" and variables["MLX_GPTOSS_SLOTS"] == "7"
    assert variables["PATH"] == os.environ["PATH"] and "UNRELATED" not in variables
    said = capsys.readouterr().out
    assert str(host.unit) in said and "journalctl" in said and f":{host.port}" in said
    assert host.calls() == [
        "systemctl --user daemon-reload",
        "systemctl --user enable mlx-gptoss.service",
        "systemctl --user reset-failed mlx-gptoss.service",
        "systemctl --user restart mlx-gptoss.service",
    ]


def entries(unit: str) -> dict[str, str]:
    return dict(line.split("=", 1) for line in unit.splitlines() if "=" in line and not line.startswith("#"))


def test_the_unit_restarts_after_a_crash_but_not_for_ever(host):
    from mlx_gptoss.server.run import DRAIN_TIMEOUT_S

    host.install()
    unit = entries(host.unit.read_text())
    assert unit["Restart"] == "on-failure" and unit["RestartPreventExitStatus"] == "2"
    assert int(unit["StartLimitBurst"]) * int(unit["RestartSec"]) < int(unit["StartLimitIntervalSec"])
    assert unit["KillSignal"] == "SIGTERM" and unit["KillMode"] == "mixed"
    assert int(unit["TimeoutStopSec"]) > DRAIN_TIMEOUT_S + 5
    assert unit["NoNewPrivileges"] == "yes"


def test_tools_keep_the_privileges_that_their_sandbox_may_need(host):
    host.install("--tools", "python")
    assert "NoNewPrivileges" not in host.unit.read_text()


@pytest.mark.parametrize("given_by", ["option", "variable"])
@pytest.mark.parametrize("system", ["linux", "darwin"])
def test_a_key_is_in_a_file_that_only_the_user_can_read(host, monkeypatch, given_by, system):
    monkeypatch.setattr(sys, "platform", system)
    key = 's3 "cr$t%\\`'
    if given_by == "variable":
        monkeypatch.setenv("MLX_GPTOSS_API_KEY", key)
    host.install(*(["--api-key", key] if given_by == "option" else []))
    if system == "linux":
        assert host.variables()["MLX_GPTOSS_API_KEY"] == key
        assert "s3" not in host.unit.read_text()
        assert f"EnvironmentFile={host.variables_file}" in host.unit.read_text()
    else:
        agent = plistlib.loads(host.agent.read_bytes())
        assert agent["EnvironmentVariables"]["MLX_GPTOSS_API_KEY"] == key
        assert not [word for word in agent["ProgramArguments"] if "s3" in word]
    assert host.files() and all(stat.S_IMODE(path.stat().st_mode) == 0o600 for path in host.files())


def test_relative_paths_become_absolute(host, mini, tmp_path, monkeypatch):
    shutil.copytree(mini / "mxfp4", tmp_path / "models/my model")
    monkeypatch.chdir(tmp_path)
    (tmp_path / "tools.toml").write_text('[browser]\nsearch = "exa"\nkey_env = "MY_KEY"\n')
    monkeypatch.setenv("MY_KEY", "k")
    monkeypatch.setenv("MLX_GPTOSS_PROMPT_CACHE", "cache")
    (tmp_path / "nano").mkdir()  # not the bundled model that --model nano means
    host.install("--model", "models/my model", "--model", "nano", "--tools", "browser", "--tools-config", "tools.toml")
    assert [w for w in host.words() if "--model" in w] == [f"--model={tmp_path}/models/my model", "--model=nano"]
    assert f"--tools-config={tmp_path}/tools.toml" in host.words()
    assert host.variables()["MLX_GPTOSS_PROMPT_CACHE"] == f"{tmp_path}/cache"
    assert host.variables()["MY_KEY"] == "k"


def test_the_script_is_preferred_since_its_path_outlives_an_upgrade(tmp_path):
    (script := tmp_path / "mlx-gptoss").write_text("")
    assert install_service._program(str(script))[0] == PYTHON
    script.chmod(0o755)
    assert install_service._program(str(script)) == [str(script)]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--model", "./nowhere"], "nowhere"),
        (["--model", "no-such-model"], "no-such-model"),
        (["--host", "0.0.0.0"], "--api-key"),
        (["--api-key", " "], "empty"),
        (["--alias", "x"], "NAME=M"),
        (["--tools", "nonsense"], "nonsense"),
        (["--kv-bits", "8", "--backend", "cuda"], "kv_bits"),
        (["--cors", "a\nb"], "character"),
        (["--api-key", "a\x7fb"], "character"),
        (["--port", "0"], "port"),
    ],
)
@pytest.mark.parametrize("system", ["linux", "darwin"])
def test_nothing_is_written_for_what_the_server_would_refuse(host, monkeypatch, system, options, message):
    monkeypatch.setattr(sys, "platform", system)
    with pytest.raises(Exception, match=re.escape(message)):
        host.serve("--install-service", *options, port="--port" not in options)
    assert not host.files() and not host.calls()


def test_a_port_in_use_is_refused_unless_the_service_may_be_what_uses_it(host):
    with socket.create_server(("127.0.0.1", host.port)):
        with pytest.raises(GptOssError, match="cannot listen"):
            host.install()
        assert not host.files()
    host.install()
    with socket.create_server(("127.0.0.1", host.port)):
        host.install("--strict-model")
    assert "--strict-model" in host.words()


def test_an_existing_service_is_replaced_or_stays(host, monkeypatch):
    host.install("--api-key", "old")
    before = host.unit.read_bytes()
    monkeypatch.setattr(os, "fsync", lambda descriptor: (_ for _ in ()).throw(OSError("the disk is full")))
    with pytest.raises(OSError, match="full"):
        host.install("--api-key", "new", "--strict-model")
    assert host.unit.read_bytes() == before and host.variables()["MLX_GPTOSS_API_KEY"] == "old"
    assert len(host.files()) == 2


def test_removing_is_idempotent(host, capsys):
    host.install()
    host.calls()
    host.serve("--remove-service", port=False)
    assert not host.files() and not host.variables_file.parent.exists()
    assert host.calls() == ["systemctl --user disable --now mlx-gptoss.service", "systemctl --user daemon-reload"]
    assert "Removed" in capsys.readouterr().out
    host.serve("--remove-service", port=False)
    assert not host.calls()
    assert "no service" in capsys.readouterr().out


def test_where_the_supervisor_fails_the_files_stay_and_the_error_names_the_commands(host, monkeypatch):
    monkeypatch.setenv("FAIL", "enable")
    with pytest.raises(GptOssError, match="no such bus") as raised:
        host.install()
    assert host.unit.exists() and "systemctl --user restart mlx-gptoss.service" in str(raised.value)
    monkeypatch.setenv("FAIL", "disable")
    with pytest.raises(GptOssError, match="no such bus") as raised:
        host.serve("--remove-service", port=False)
    assert not host.files() and "systemctl --user disable --now" in str(raised.value)


def test_without_a_supervisor_nothing_is_written(host, monkeypatch, tmp_path):
    host.install()
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(GptOssError, match="no systemctl"):
        host.serve("--remove-service", port=False)
    assert not host.files()
    with pytest.raises(GptOssError, match=r"no systemctl.*mlx_gptoss_cli serve --backend=mlx"):
        host.install()
    assert not host.files()


@pytest.mark.parametrize(
    ("system", "variables", "message"), [("win32", {}, "not for win32"), ("linux", {"SUDO_USER": "ann"}, "sudo")]
)
def test_a_system_or_user_that_has_no_service_is_told_so(host, monkeypatch, system, variables, message):
    monkeypatch.setattr(sys, "platform", system)
    monkeypatch.setattr(os, "geteuid", lambda: 0)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    for option in ("--install-service", "--remove-service"):
        with pytest.raises(GptOssError, match=message):
            host.serve(option, port=False)
    assert not host.files()


def test_variables_do_not_install_or_remove_a_service(host, monkeypatch):
    monkeypatch.setenv("MLX_GPTOSS_INSTALL_SERVICE", "1")
    monkeypatch.setenv("MLX_GPTOSS_REMOVE_SERVICE", "1")
    host.install()
    assert host.unit.exists() and "SERVICE" not in host.variables_file.read_text()


def test_the_launch_agent(mac, capsys):
    from mlx_gptoss.server.run import DRAIN_TIMEOUT_S

    mac.install("--cors", "a & <b>")
    agent = plistlib.loads(mac.agent.read_bytes())
    assert agent["Label"] == mac.agent.stem
    assert agent["ProgramArguments"][:4] == [PYTHON, "-m", "mlx_gptoss_cli", "serve"]
    assert "--cors=a & <b>" in agent["ProgramArguments"] and "--install-service" not in agent["ProgramArguments"]
    assert agent["RunAtLoad"] and agent["KeepAlive"] == {"SuccessfulExit": False}
    assert agent["ThrottleInterval"] >= 10 and agent["ExitTimeOut"] > DRAIN_TIMEOUT_S + 5
    log = f"{mac.home}/Library/Logs/mlx-gptoss.log"
    assert agent["StandardOutPath"] == agent["StandardErrorPath"] == log
    assert log in capsys.readouterr().out
    service = f"gui/{os.getuid()}/local.mlx-gptoss.serve"
    stop = [f"launchctl bootout {service}", f"launchctl print {service}"]
    start = [f"launchctl enable {service}", f"launchctl bootstrap gui/{os.getuid()} {mac.agent}"]
    assert mac.calls() == [*stop, *start]
    mac.serve("--remove-service", port=False)
    assert mac.calls() == stop and not mac.files()


def test_a_launch_agent_that_cannot_be_started_stays(mac, monkeypatch):
    monkeypatch.setenv("FAIL", "bootstrap")
    monkeypatch.setenv("FAIL_CODE", "125")
    with pytest.raises(GptOssError, match="125") as raised:
        mac.install()
    assert mac.agent.exists() and f"launchctl bootstrap gui/{os.getuid()} " in str(raised.value)


def test_a_launch_agent_ends_with_0_after_a_usage_error_so_that_launchd_leaves_it(monkeypatch, capsys):
    codes = []
    for words in (["serve", "--no-such-option"], ["serve", "--model", "./nowhere"]):
        monkeypatch.setattr(sys, "argv", ["mlx-gptoss", *words])
        for under_launchd in (False, True):
            if under_launchd:
                monkeypatch.setenv("MLX_GPTOSS_LAUNCHD", "1")
            else:
                monkeypatch.delenv("MLX_GPTOSS_LAUNCHD", raising=False)
            with pytest.raises(SystemExit) as ended:
                main()
            codes.append(ended.value.code)
    assert codes == [2, 0, 1, 1]


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
