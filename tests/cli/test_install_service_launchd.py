"""The LaunchAgent: its property list, and the calls of launchctl, replaced by a program that records them."""

from __future__ import annotations

import os
import plistlib
import sys

import pytest
from hypothesis import given
from hypothesis import strategies as st
from mlx_gptoss_cli.main import main
from mlx_gptoss_cli.supervisors import Command, Launchd
from service_host import PYTHON, plain

from mlx_gptoss.errors import GptOssError

pytest.importorskip("uvicorn", reason="needs the serve extra")


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


@given(st.lists(plain), plain)
def test_a_property_list_is_parsed_back(words, value):
    (data,) = Launchd().render(Command(("/bin/x", *words), {"X": value}, 45)).values()
    agent = plistlib.loads(data)
    assert agent["ProgramArguments"] == ["/bin/x", *words]
    assert agent["EnvironmentVariables"]["X"] == value
