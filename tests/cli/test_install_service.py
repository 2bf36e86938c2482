"""serve --install-service and --remove-service: what is written and called, with systemctl replaced by a program that
records its calls."""

from __future__ import annotations

import os
import plistlib
import re
import shutil
import socket
import stat
import sys

import pytest
from mlx_gptoss_cli import install_service
from service_host import HOSTILE, PYTHON

from mlx_gptoss.errors import GptOssError

pytest.importorskip("uvicorn", reason="needs the serve extra")


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
