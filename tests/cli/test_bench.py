"""mlx-gptoss bench as a user types it, on tiny random weights; the peers are the real programs."""

from __future__ import annotations

import json
import subprocess
import sys
from importlib.util import find_spec

import pytest

CLI = [sys.executable, "-m", "mlx_gptoss_cli"]
FIELDS = {
    "engine", "backend", "device", "format", "batch", "prompt", "generate", "load_s", "prefill_tok_s", "decode_tok_s",
    "peak_memory_bytes", "bytes_per_token", "bandwidth_gb_s", "fraction_of_bound",
}  # fmt: skip
TINY = ["--synthetic", "tiny", "--backend", "mlx", "--device", "cpu", "--prompt", "40", "--generate", "4"]


@pytest.fixture
def run(tmp_path):
    def run(*words):
        return subprocess.run([*CLI, "bench", *words], capture_output=True, text=True, timeout=300, cwd=tmp_path)

    return run


def test_json_has_the_promised_fields(run):
    done = run("--json", "--prompt", "16", "--generate", "4", "--repeat", "1")
    report = json.loads(done.stdout)
    (result,) = report["results"]
    assert set(result) >= FIELDS and "ratio" not in report
    assert (result["engine"], result["format"], result["generate"]) == ("mlx-gptoss", "mxfp4", 4)
    assert result["host_ms_per_step"] > 0 and result["published_bound_tok_s"] is None
    # Of 24 tiny layers: nothing is large enough for another buffer but the number of launches.
    assert report["command_buffers_per_token"]["MLX's limits"] == report["launches_per_token"]["mlx-gptoss"] // 51 + 1
    assert "prefill 1 of 1" in done.stderr  # progress


def test_every_batch_with_every_context(run, tmp_path):
    grid = ["--batch", "2", "--batch", "1", "--context", "200", "--context", "64", "--quantize", "mlx-4bit"]
    done = run(*TINY, *grid, "--plot", "speed.png", "--plot-style", "dark", "--json")
    found = [(r["batch"], r["context"], r["format"]) for r in json.loads(done.stdout)["results"]]
    assert found == [(b, c, "mlx-4bit") for b in (1, 2) for c in (64, 200)]
    assert all(len(r["decode_runs"]) == len(r["prefill_runs"]) == 3 for r in json.loads(done.stdout)["results"])
    image = pytest.importorskip("matplotlib.image").imread(tmp_path / "speed.png")
    assert image[0, 0, :3].max() < 0.2


def test_the_table_is_readable(run):
    out = run(*TINY, "--format", "mlx-8bit", "--layers", "2", "--repeat", "1").stdout
    for words in (
        "mlx-8bit",
        "GB/s",
        "prefill tok/s",
        "decode tok/s",
        "of bound",
        "mlx-gptoss",
        "MB read",
        "ms of host time",
        "Launches a token",
        "Command buffers a token on an Apple GPU, estimated",
    ):
        assert words in out


def test_drafts_are_counted(run):
    words = [*TINY, "--layers", "2", "--repeat", "1", "--speculate"]
    (result,) = json.loads(run(*words, "--json").stdout)["results"]
    assert result["format"] == "mxfp4, drafts" and set(result["drafts"]) == {"steps", "drafted", "right"}
    assert "were right, in" in run(*words).stdout


@pytest.mark.parametrize(
    ("peer", "form"), [("mlx-lm", "mlx-4bit"), ("transformers", "mxfp4"), ("transformers", "bf16")]
)
def test_others_take_turns_on_the_same_weights(run, peer, form):
    if find_spec(peer.replace("-", "_")) is None:
        pytest.skip(f"{peer} is not installed")
    done = run(*TINY, "--format", form, "--context", "150", "--against", peer, "--against-dtype", "float32", "--json")
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout)
    ours, theirs = report["results"]
    assert theirs["engine"].startswith(peer) and theirs["decode_tok_s"] > 0 and theirs["peak_memory_bytes"] > 0
    assert report["ratio"]["decode"] == pytest.approx(ours["decode_tok_s"] / theirs["decode_tok_s"])
    assert ours["ratio"] == pytest.approx(report["ratio"])
    (agreement,) = report["agreement"]
    launches = report["launches_per_token"]  # of the shapes' own layers, counted as on a GPU
    assert launches["mlx-gptoss"] <= 0.6 * launches.get("mlx-lm", 1000)
    assert ("mlx-lm" in launches) == (peer == "mlx-lm")
    # mlx-lm rounds YaRN's range, so positions beyond the first differ; transformers does not.
    assert agreement["kl"] < (1e-9 if peer == "transformers" else 1e-2)


def test_the_other_backend_takes_turns_in_one_process(run):
    if find_spec("torch") is None:
        pytest.skip("torch is not installed")
    report = json.loads(run(*TINY, "--against", "cuda", "--quantize", "mlx-8bit", "--json").stdout)
    assert [(r["backend"], r["format"]) for r in report["results"]] == [("mlx", "mlx-8bit"), ("cuda", "mlx-8bit")]
    assert report["agreement"][0]["kl"] < 1e-9 and report["ratio"]["decode"] > 0


def test_wrong_uses_say_what_to_do(run, mini, tmp_path):
    for words, said in [
        (["--synthetic", "7b"], "20b, 120b, tiny"),
        (["--layers", "2"], "--synthetic"),
        ([*TINY, "--context", "8"], "shorter than the prompt"),
        ([*TINY, "--against", "mlx-lm", "--quantize", "mlx-4bit"], "convert"),
        ([*TINY, "--format", "mxfp5"], "choose one of"),
        ([*TINY, "--speculate", "--against", "cuda"], "the speed depends on the text"),
        (["--model", str(mini / "mlx-4bit"), *TINY[2:], "--against", "transformers"], "transformers failed"),
    ]:
        done = run(*words)
        assert done.returncode in (1, 2) and said in done.stderr, (words, done.stderr)
        assert "Traceback" not in done.stderr
