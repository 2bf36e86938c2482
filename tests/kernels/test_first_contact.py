"""The program for a new GPU keeps what a stage has found, whatever becomes of the stage."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import first_contact
import pytest

PRINT = "import json; print('before'); print(json.dumps({'n': 1})); print('{no json'); "


def result_of(code: str, limit_s: float = 60.0) -> first_contact.Result:
    stage = first_contact.Stage("a stage", (sys.executable, "-c", code), limit_s)
    result = first_contact.Result(stage.name)
    first_contact.run(stage, result, limit_s)
    return result


@pytest.mark.parametrize(
    ("ending", "state"),
    [("", "passed"), ("raise SystemExit(3)", "failed"), ("import time; time.sleep(600)", "out of time")],
)
def test_what_a_stage_printed_is_kept(ending, state):
    result = result_of(PRINT + ending, 6.0 if state == "out of time" else 60.0)
    assert result.state == state
    assert result.found == [{"n": 1}] and result.lines[:2] == ["before", "{no json"]


def test_a_stage_that_ignores_the_end_of_its_time_is_killed_with_its_children(tmp_path):
    path = tmp_path / "child"
    code = (
        "import signal, subprocess, sys, time; signal.signal(signal.SIGTERM, signal.SIG_IGN)\n"
        "child = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(600)'])\n"
        f"open({str(path)!r}, 'w').write(str(child.pid))\n"
        "time.sleep(600)"
    )
    assert result_of(code, 8.0).state == "out of time"
    child = int(path.read_text())
    for _ in range(100):
        if not Path(f"/proc/{child}").exists() or "Z" in Path(f"/proc/{child}/stat").read_text().split()[2]:
            return
        time.sleep(0.1)
    os.kill(child, signal.SIGKILL)
    pytest.fail("the stage's child is still there")


def test_the_report_is_written_whole(tmp_path):
    results = [first_contact.Result("a", "passed", 1.0, [{"x": 1}]), first_contact.Result("b")]
    first_contact.save(results, tmp_path / "report.json")
    read = json.loads((tmp_path / "report.json").read_text())
    assert [r["state"] for r in read] == ["passed", "not begun"] and os.listdir(tmp_path) == ["report.json"]


def test_the_stages_come_in_an_order_that_checks_before_it_times():
    names = [stage.name for stage in first_contact.stages(tiny=False)]
    assert names[0] == "versions" and first_contact.stages(tiny=False)[0].needed
    assert names.index("race") < min(i for i, name in enumerate(names) if name.startswith(("speed", "prompt", "tiles")))
    for stage in first_contact.stages(tiny=False):
        script = next((word for word in stage.words if word.endswith(".py")), None)
        assert script is None or (first_contact.HERE.parents[1] / script).exists(), stage


@pytest.mark.slow
def test_all_of_it_in_the_interpreter(tmp_path):
    """At tiny sizes, from beginning to end; the times mean nothing."""
    environment = os.environ | {"TRITON_INTERPRET": "1"}
    words = [sys.executable, first_contact.__file__, "--out", tmp_path, "--minutes", "80"]
    out = subprocess.run(words, env=environment, capture_output=True, text=True, timeout=5400, check=False)
    report = json.loads((tmp_path / "first_contact.json").read_text())
    assert {r["stage"]: r["state"] for r in report} == {r["stage"]: "passed" for r in report}, out.stdout[-3000:]
    assert (tmp_path / "first_contact.png").stat().st_size > 10_000
    found = {r["stage"]: r["found"] for r in report}
    assert found["versions"][0]["interpreted"] is True
    assert all(case["different"] == 0 for case in found["race"])
    assert found["bundled model"][0]["same_answer"]
