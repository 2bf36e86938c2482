"""`eval --adapter` and `bench --adapter`: the numbers are those of the adapter, and say whose they are."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace

import numpy as np
import pytest
from nano_adapter import write_nano_adapter

import mlx_gptoss
from mlx_gptoss.backends import BACKENDS
from mlx_gptoss.errors import GptOssError
from mlx_gptoss.loading.plan import NANO, LoadRequest
from mlx_gptoss.measure import agreement, benchmark
from mlx_gptoss.measure.benchmark import BenchModel, Target
from mlx_gptoss.measure.costs import step_bytes
from mlx_gptoss.measure.timing import Case
from mlx_gptoss.weights import checkpoint as checkpoints
from mlx_gptoss.weights.adapters import open_adapter

CLI = [sys.executable, "-m", "mlx_gptoss_cli"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """An adapter that changes the answers but leaves them sensible, so that rounding is not amplified."""
    return write_nano_adapter(tmp_path_factory.mktemp("adapters") / "loud", scale=0.05, experts=True)


@pytest.fixture(scope="module")
def merged(folder, tmp_path_factory):
    destination = tmp_path_factory.mktemp("merged") / "merged"
    mlx_gptoss.convert(NANO, destination, to="bf16", adapter=folder)
    return destination


def run(*words, cwd=None):
    return subprocess.run([*CLI, *map(str, words)], capture_output=True, text=True, timeout=300, cwd=cwd)


@pytest.mark.parametrize("backend", BACKENDS)
def test_the_divergence_is_large_from_the_base_and_none_from_the_merged_model(backend_module, folder, merged, backend):
    """But for the rounding of the merged weights to bfloat16."""
    backend_module(backend)
    options = {"adapter": folder, "max_tokens": 200, "context": 256, "dtype": "float32", "device": "cpu"}
    (found,) = mlx_gptoss.evaluate(None, against=[NANO, merged], backend=backend, **options)
    base, same = found.against
    assert base.kl_mean > 0.1 and same.kl_mean < 2e-5 and same.kl_max < 1e-3
    assert same.top1_agreement > 0.99 and base.reference.adapter is None
    assert found.perplexity == pytest.approx(same.reference.perplexity, rel=1e-3)
    assert abs(found.perplexity / base.reference.perplexity - 1) > 0.1
    assert (found.adapter, found.label) == ("loud", "the bundled model + loud")


def test_eval_says_which_adapter(folder, tmp_path):
    (tmp_path / "text.txt").write_text("Add 12 and 30.")
    words = ["eval", NANO, "--against", NANO, "--text", "text.txt", "--adapter", f"brief={folder}"]
    report = json.loads(run(*words, "--json", cwd=tmp_path).stdout)
    assert report["adapter"] == "brief" and report["kl_mean"] > 0.01 and report["model"] == report["against"]
    done = run(*words, "--plot", "kl.png", cwd=tmp_path)
    assert done.returncode == 0 and "+brief" in "".join(done.stdout.split())  # a long path is folded
    assert (tmp_path / "kl.png").read_bytes().startswith(b"\x89PNG")
    assert "give one --adapter" in run(*words, "--adapter", f"b={folder}").stderr


def test_bench_says_which_adapter_and_counts_what_it_reads(folder):
    words = [
        "bench",
        "--prompt",
        8,
        "--generate",
        2,
        "--repeat",
        1,
        "--batch",
        3,
        "--backend",
        "mlx",
        "--device",
        "cpu",
    ]
    plain = json.loads(run(*words, "--json").stdout)["results"][0]
    report = json.loads(run(*words, "--adapter", f"brief={folder}", "--json").stdout)
    result, config = report["results"][0], checkpoints.open(NANO).config
    assert result["adapter"] == "brief" and "adapter" not in plain and "launches_per_token" not in report
    E, A, D, inner = (
        config.num_local_experts, config.num_experts_per_tok, config.hidden_size, config.intermediate_size
    )  # fmt: skip
    qkv = 8 * D + 8 * (config.q_size + 2 * config.kv_size)  # two a's, and b with a row for every output of q, k and v
    down = E * 4 * (inner + D) * (1 - (1 - A / E) ** 3)
    assert result["bytes_per_step"] - plain["bytes_per_step"] == pytest.approx(
        4 * config.num_hidden_layers * (qkv + down)
    )
    assert "adapter brief" in run(*words, "--adapter", f"brief={folder}").stdout
    assert "one --adapter" in run(*words, "--adapter", folder, "--against", "cuda").stderr


def test_all_that_is_timed_uses_the_adapter(folder, monkeypatch):
    """And what is checked before, in a narrow data type."""
    target = Target.find("mlx", "cpu", "bfloat16")
    used, load = [], target.module.load

    def recording(source, **options):
        runner = load(source, **options)
        submit, logits = runner.submit, runner.logits
        runner.submit = lambda rows: used.extend(row.adapter for row in rows) or submit(rows)
        runner.logits = lambda ids, adapter=None: used.append(adapter) or logits(ids, adapter)
        return runner

    monkeypatch.setattr(target.module, "load", recording)
    source = checkpoints.open(NANO)
    model = BenchModel(source, source.size_bytes, source.format, LoadRequest(adapters={"loud": str(folder)}))
    report = benchmark.bench(model, [Case(2, 8, 8, 2)], target, repeat=1)
    assert report.results[0].adapter == "loud" and report.agreements[0].kl < 0.05
    assert len(used) > 10 and set(used) == {0}


class WithoutTheAdapter:
    """A backend whose second copy of the model, the oracle, does not apply the adapter."""

    def __init__(self, module):
        self.module, self.loaded, self.prefill_chunk = module, 0, module.prefill_chunk

    def load(self, source, *, adapters, **options):
        self.loaded += 1
        if self.loaded == 2:
            adapters = [
                replace(each, entries={n: replace(e, scale=0.0) for n, e in each.entries.items()}) for each in adapters
            ]
        return self.module.load(source, adapters=adapters, **options)


@pytest.mark.parametrize("backend", BACKENDS)
def test_an_adapter_that_is_applied_wrongly_is_not_timed(backend_module, folder, backend):
    module, source = backend_module(backend), checkpoints.open(NANO)
    adapter = open_adapter(folder, source.config)
    exact = agreement.with_cpu_float32(module, source, backend, "cpu", "float32", [2], adapter)
    assert exact.kl < 1e-9 and exact.decode_error < 1e-4
    with pytest.raises(GptOssError, match="nothing was timed"):
        agreement.with_cpu_float32(WithoutTheAdapter(module), source, backend, "cpu", "float32", [2], adapter)


def test_bytes_of_a_step_without_an_adapter_are_as_before():
    config = checkpoints.open(NANO).config
    sizes = dict.fromkeys((param.name for param in checkpoints.open(NANO).params), 10)
    assert step_bytes(sizes, config, 2, 9, 4) == step_bytes(sizes, config, 2, 9, 4, None)


def test_only_the_first_layers_of_an_adapter(folder):
    adapter = open_adapter(folder, checkpoints.open(NANO).config)
    first = adapter.first_layers(1)
    assert set(first.entries) == {name for name in adapter.entries if name.startswith("layers.0.")} != set()
    assert first.config.num_hidden_layers == 1 and not [n for n in first.outputs if n.startswith("layers.1")]
    assert np.array_equal(first.delta("layers.0.attention.q"), adapter.delta("layers.0.attention.q"))
