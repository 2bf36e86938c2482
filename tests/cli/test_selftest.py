"""mlx-gptoss selftest as a user types it."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from importlib.util import find_spec

import pytest

CLI = [sys.executable, "-m", "mlx_gptoss_cli", "selftest"]
CPU = ["--backend", "mlx", "--device", "cpu"]
BREAK_A_KERNEL = """
import sys
from mlx_gptoss.backends.mlx import model
rotate = model.Rotary.__call__
model.Rotary.__call__ = lambda self, x, offsets: rotate(self, x, offsets + 1)
sys.argv = ["mlx-gptoss", *sys.argv[1:]]
from mlx_gptoss_cli.main import main
main()
"""


def run(*words, **options):
    return subprocess.run([*CLI, *CPU, *words], capture_output=True, text=True, timeout=300, **options)


def test_json_has_the_promised_fields():
    done = run("--only", "RMS", "--only", "8-bit K/V", "--only", "speed, copies", "--json")
    assert done.returncode == 0 and done.stderr == ""
    report = json.loads(done.stdout)
    assert report["ok"] is True
    assert [check["name"] for check in report["checks"]] == [
        "RMSNorm",
        "attention, 8-bit K/V",
        "speed, copies of memory",
    ]
    for check in report["checks"]:
        assert check["ok"] is True and check["seconds"] >= 0
    norm, _, copies = report["checks"]
    assert norm["error"] <= norm["limit"] and {case["case"] for case in norm["cases"]} >= {"1 row", "128 rows"}
    assert copies["measured"][0]["value"] > 0
    facts = report["facts"]
    assert facts["packages"]["mlx"] and facts["memory_bytes"] > 0 and facts["device"]
    assert facts["open_files"]["soft"] is None or facts["open_files"]["soft"] > 0


def test_what_cannot_run_here_is_named_and_not_counted():
    if find_spec("torch") is None:
        pytest.skip("torch is not installed")
    words = [*CLI, "--backend", "cuda", "--device", "cpu", "--only", "the fused kernel", "--only", "RMS"]
    done = subprocess.run([*words, "--json"], capture_output=True, text=True, timeout=300)
    report = json.loads(done.stdout)
    assert [check["name"] for check in report["checks"]] == ["RMSNorm"]
    (skipped,) = report["skipped"]
    assert skipped["name"] == "attention, the fused kernel" and skipped["reason"]
    shown = subprocess.run(words, capture_output=True, text=True, timeout=300).stdout
    assert "skipped attention, the fused kernel" in shown and "1 failed" not in shown and "1 skipped" in shown


def test_a_broken_kernel_ends_with_code_1_and_says_what_to_do():
    program = [sys.executable, "-c", BREAK_A_KERNEL, "selftest", *CPU, "--only", "RoPE", "--only", "RMS"]
    done = subprocess.run(program, capture_output=True, text=True, timeout=300)
    assert done.returncode == 1
    assert "FAILED  RoPE" in done.stdout and "ok      RMSNorm" in done.stdout
    assert "position 4096: error" in done.stdout and "To do: report it" in done.stdout
    assert done.stderr.startswith("error: 1 of 2 checks failed (RoPE)") and done.stderr.count("\n") == 1
    report = subprocess.run([*program, "--json"], capture_output=True, text=True, timeout=300)
    assert report.returncode == 1
    found = json.loads(report.stdout)
    assert found["ok"] is False and [check["name"] for check in found["checks"] if not check["ok"]] == ["RoPE"]


def test_names_and_patterns():
    names = run("--list").stdout.splitlines()
    assert len(names) == len(set(names)) > 30
    assert {"experts, mxfp4", "attention, sliding", "K/V written in place"} <= set(names)
    assert json.loads(run("--list", "--json", "--only", "lm_head").stdout) == [
        "lm_head, affine 4-bit, groups of 64", "lm_head, bfloat16",
    ]  # fmt: skip
    wrong = run("--only", "nothing")
    assert wrong.returncode == 1 and "--list shows their names" in wrong.stderr
    assert "did you mean selftest" in subprocess.run([*CLI[:3], "doctor"], capture_output=True, text=True).stderr


def test_secrets_stay_here():
    secrets = {"HF_HUB_TOKEN": "hidden", "MLX_GPTOSS_API_KEY": "hidden"}
    done = run("--only", "RMS", "--json", env={**os.environ, **secrets, "MLX_MAX_OPS_PER_BUFFER": "200"})
    assert json.loads(done.stdout)["facts"]["variables"]["MLX_MAX_OPS_PER_BUFFER"] == "200"
    assert "hidden" not in done.stdout


def test_ctrl_c_ends_it_and_keeps_what_was_shown():
    process = subprocess.Popen([*CLI, *CPU], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert process.stdout is not None and process.stderr is not None
    shown = ""
    while "RMSNorm" not in shown:
        shown += process.stdout.readline()
    time.sleep(0.5)  # within one of the next checks
    process.send_signal(signal.SIGINT)
    assert process.wait(60) == 130
    assert "Traceback" not in process.stderr.read()


def test_a_terminal_shows_which_check_runs():
    pexpect = pytest.importorskip("pexpect")
    child = pexpect.spawn(CLI[0], [*CLI[1:], *CPU, "--only", "linear, mxfp8"], encoding="utf-8", timeout=120)
    child.expect("1 of 1: linear, mxfp8")
    child.expect("ok      linear, mxfp8")
    child.expect(pexpect.EOF)
    child.close()
    assert child.exitstatus == 0


@pytest.mark.slow
@pytest.mark.parametrize("backend", ["mlx", "cuda"])
def test_all_checks_pass_on_this_machine(backend):
    """At the widths of gpt-oss."""
    if backend == "cuda" and find_spec("torch") is None:
        pytest.skip("torch is not installed")
    done = subprocess.run([*CLI, "--backend", backend, "--json"], capture_output=True, text=True, timeout=600)
    report = json.loads(done.stdout)
    assert report["ok"] and len(report["checks"]) > 30, [check for check in report["checks"] if not check["ok"]]
