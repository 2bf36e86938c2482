"""The report of a benchmark: what is in it, and that nothing of a person is."""

from __future__ import annotations

import getpass
import json
import os
import platform
import re
import shutil
import socket
import subprocess
import sys

import pytest

pytest.importorskip("matplotlib")
from mlx_gptoss.config import TINY
from mlx_gptoss.errors import InvalidRequest
from mlx_gptoss.measure import report as reports
from mlx_gptoss.measure.agreement import Agreement
from mlx_gptoss.measure.benchmark import Measurement, Report
from mlx_gptoss.measure.chips import published_bandwidth

NAME = "zebedee"  # of everything that may not be there
ADDRESS = re.compile(r"\b\d{1,3}(\.\d{1,3}){3}\b|[\w.]+@[\w.]+|://|([0-9a-f]{2}:){5}[0-9a-f]{2}")
FACTS = {
    "python": "3.11.2", "packages": {"mlx": "0.32.4"}, "wheels": {"mlx-metal": "py3-none-macosx_26_0_arm64"},
    "os": f"Linux-6.1.0-{NAME}-x86_64", "architecture": "arm64", "chip": "Apple M4 Max", "gpu_cores": 40, "cores": 16,
    "memory_bytes": 64 << 30, "available_bytes": 1, "backend": "mlx", "dtype": "bfloat16",
    "device": {"device_name": "Apple M4 Max", "architecture": "applegpu_g16s", "serial": NAME},
    "variables": {
        "MLX_MAX_OPS_PER_BUFFER": "200", "MLX_METAL_GPU_ARCH": "applegpu_g15d", "MLX_BFS_MAX_WIDTH": f"/{NAME}",
        "MLX_HOSTFILE": f"/Users/{NAME}/hosts.json", "MLX_JACCL_COORDINATOR": "192.168.0.7:5000", "HF_HOME": NAME,
        "HF_ENDPOINT": f"https://{NAME}.example",
    },
    "open_files": {"soft": 256, "hard": None}, "hub_cache": {"path": f"/Users/{NAME}/hub", "free_bytes": 5},
}  # fmt: skip


def measured(**values) -> Measurement:
    given = {
        "engine": "mlx-gptoss", "backend": "mlx", "device": "Apple M4 Max", "format": "mxfp4", "batch": 1,
        "prompt": 512, "context": 512, "generate": 64, "load_s": 2.0, "prefill_tok_s": 1000.0, "decode_tok_s": 100.0,
        "peak_memory_bytes": 14 << 30, "bytes_per_token": 3.71e9, "host_ms_per_step": 1.9, "prefill_runs": (1000.0,),
        "decode_runs": (100.0,),
    }  # fmt: skip
    return Measurement(**given | values)


def report_of(*results: Measurement) -> Report:
    agreement = Agreement(f"/Users/{NAME}", 2, 64, 1e-3, 1.0, 1e-3, 1e-2, None)
    launches, buffers = {"mlx-gptoss": 416}, {"MLX's limits": 49, "ours": 14}
    return Report(results, (agreement,), None, launches, buffers, published_bandwidth("Apple M4 Max", 40))


def test_only_what_is_named_is_in_it():
    found = reports.content(report_of(measured(format=f"~/{NAME}"), measured(engine=f"/opt/{NAME}/x")), TINY, FACTS)
    text = json.dumps(found)
    assert NAME not in text and not ADDRESS.search(text)
    assert found["machine"]["settings"] == {"MLX_MAX_OPS_PER_BUFFER": "200", "MLX_METAL_GPU_ARCH": "applegpu_g15d"}
    assert found["machine"]["chip"] == "Apple M4 Max" and found["machine"]["gpu_cores"] == 40
    assert found["machine"]["os"] == f"Linux {re.match('[0-9.]*[0-9]', platform.release())[0]}"
    first, second = found["results"]
    assert (first["format"], second["engine"]) == ("other", "another engine")
    assert first["decode_tok_s"] == 100.0 and first["host_ms_per_step"] == 1.9
    assert found["launches_per_token"] == {"mlx-gptoss": 416}
    assert found["command_buffers_per_token"] == {"MLX's limits": 49, "ours": 14}
    assert found["published_bandwidth"]["gb_s"] == 546


@pytest.mark.parametrize("form", ["mxfp4", "mlx-mxfp4-q8", "mxfp4, rest-8bit", "mlx-4bit, computed in bfloat16"])
def test_formats_keep_their_names(form):
    assert reports.content(report_of(measured(format=form)), TINY, FACTS)["results"][0]["format"] == form


def test_wrong_files_are_refused_before_anything_is_measured(tmp_path):
    with pytest.raises(InvalidRequest, match=r"named as JSON.*bench\.json"):
        reports.check_report(tmp_path / "bench.txt")
    with pytest.raises(InvalidRequest, match="does not exist"):
        reports.check_report(tmp_path / "none" / "bench.json")


def test_a_user_sends_no_personal_data(tmp_path, mini):
    """The command itself, in a home, a folder and a model of a name that may not be there; and the machine's own."""
    home = tmp_path / NAME
    shutil.copytree(mini / "mxfp4", home / "models" / NAME)
    environ = {
        **os.environ, "HOME": str(home), "USER": NAME, "LOGNAME": NAME, "HOSTNAME": f"{NAME}.local",
        "HF_HOME": str(home / "hub"), "MLX_HOSTFILE": str(home / "hosts.json"),
    }  # fmt: skip
    words = ["--model", str(home / "models" / NAME), "--backend", "mlx", "--device", "cpu", "--prompt", "8"]
    words += ["--generate", "2", "--repeat", "1", "--report", "r.json"]
    done = subprocess.run(
        [sys.executable, "-m", "mlx_gptoss_cli", "bench", *words],
        capture_output=True, text=True, cwd=home, env=environ, timeout=600,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    text, picture = (home / "r.json").read_text(), (home / "r.png").read_bytes()
    report = json.loads(text)
    assert report["results"][0]["decode_tok_s"] > 0 and report["machine"]["packages"]["mlx"]
    assert picture.startswith(b"\x89PNG")
    chunks = picture[: picture.index(b"IDAT")]  # what a PNG says in words comes before its pixels
    secrets = {NAME, getpass.getuser(), socket.gethostname(), platform.node(), str(tmp_path)} - {
        "root",
        "localhost",
        "",
    }
    for secret in secrets:
        assert secret not in text and secret.encode() not in chunks
    assert not ADDRESS.search(text)
