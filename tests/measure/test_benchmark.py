"""The benchmark: the bytes that it counts, the rows that it submits, and an error instead of timing wrong logits."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from mlx_gptoss import api
from mlx_gptoss.backends import BACKENDS
from mlx_gptoss.backends.base import Limits, Sampled
from mlx_gptoss.config import PRESETS, TINY
from mlx_gptoss.errors import DoesNotFit, GptOssError, InvalidRequest
from mlx_gptoss.measure import agreement
from mlx_gptoss.measure.agreement import FirstLayers
from mlx_gptoss.measure.benchmark import BenchModel, CountedWeights, Target, bench
from mlx_gptoss.measure.costs import prefill_flops, step_bytes
from mlx_gptoss.measure.timing import WARM_STEPS, Case, OurEngine, prefill_steps, prompts
from mlx_gptoss.weights import checkpoint
from mlx_gptoss.weights.synthetic import Synthetic, preset


class Recorder:
    """A runner that computes nothing and records the rows submitted and the order of waits."""

    def __init__(self, slots=4, chunk=8):
        self.config, self.limits = TINY, Limits(slots, 1000, chunk)
        self.lengths = [0] * slots
        self.log = []
        self.most_tokens = 0

    def submit(self, rows):
        number = sum(kind == "submit" for kind, _ in self.log)
        self.log.append(("submit", number))
        assert len({row.slot for row in rows}) == len(rows)
        self.most_tokens = max(self.most_tokens, sum(len(row.tokens or ()) for row in rows))
        for row in rows:
            if row.start == 0:
                self.lengths[row.slot] = 0
            assert row.start == self.lengths[row.slot]
            self.lengths[row.slot] += len(row.tokens) if row.tokens else 1
            assert row.tokens or row.sampling
        return Step(self.log, number, len(rows))

    def release(self, slot):
        pass

    def peak_memory(self):
        return 1


class Step:
    def __init__(self, log, number, rows):
        self.log, self.number, self.rows = log, number, rows

    def wait(self):
        self.log.append(("wait", self.number))
        return [Sampled(0, 0.0)] * self.rows


def test_every_step_is_submitted_before_the_last_is_read():
    runner = Recorder()
    ours = OurEngine(runner, "none", "cpu", "none", 0.0)
    ours.begin(Case(batch=3, prompt=20, context=30, generate=5))
    runner.log.clear()
    ours.prefill()
    assert runner.lengths[:3] == [20] * 3
    ours.fill()
    assert runner.lengths[:3] == [30 + WARM_STEPS] * 3
    ours.decode()
    ours.decode()
    assert runner.lengths == [30 + WARM_STEPS + 10] * 3 + [0]
    assert runner.most_tokens == 8
    assert len(ours.host_seconds) == 2 and min(ours.host_seconds) > 0
    waits = [number for kind, number in runner.log if kind == "wait"]
    assert waits == sorted(waits)
    place = {entry: n for n, entry in enumerate(runner.log)}
    ahead = [place["wait", n] > place["submit", n + 1] for n in range(3)]  # of one run of steps
    assert all(ahead)


def test_short_prompts_share_a_step():
    tokens = [tuple(range(5))] * 5
    steps = list(prefill_steps(tokens, 0, 5, 12))
    assert [[row.slot for row in rows] for rows in steps] == [[0, 1], [2, 3], [4]]
    assert all(row.sampling is not None and row.prompt == tokens[0] for rows in steps for row in rows)
    whole = list(prefill_steps(tokens[:1], 0, 5, 2))
    assert [(row.start, row.tokens, row.sampling is None) for (row,) in whole] == [
        (0, (0, 1), True), (2, (2, 3), True), (4, (4,), False)
    ]  # fmt: skip


def test_prompts_differ_by_sequence_and_are_the_same_every_time():
    case = Case(3, 10, 20, 5)
    found = prompts(320, case)
    assert found == prompts(320, case) and len(set(found)) == 3
    assert all(len(ids) == 20 and min(ids) >= 0 and max(ids) < 320 for ids in found)


@pytest.mark.parametrize(
    ("name", "form", "wanted"),
    [("20b", "mxfp4", (3.71, 9.10, 12.45, 12.59)), ("20b", "mlx-4bit", (2.03, 7.75, 11.29, 11.44)),
     ("20b", "mlx-mxfp4-q8", (2.57, 7.96, 11.31, 11.45)), ("120b", "mxfp4", (5.0,))],
)  # fmt: skip
def test_bytes_of_a_step_of_the_published_models(name, form, wanted):
    """Computed by hand, in GB: parameters times bits, with the expected number of experts, without keys and values."""
    source = Synthetic(preset(name), form)
    bits = {"mxfp4": (16, 4.25), "mlx-4bit": (4.5, 4.5), "mlx-mxfp4-q8": (8.5, 4.25)}[form]
    sizes = {
        param.name: round(param.size * (16 if not param.is_matrix else bits[param.role == "experts"]) / 8)
        for param in source.params
    }
    found = [step_bytes(sizes, source.config, batch, 0, 2) / 1e9 for batch in (1, 8, 32, 64)]
    assert found[: len(wanted)] == pytest.approx(wanted, rel=0.01)
    with_keys = step_bytes(sizes, source.config, 1, 100_000, 2) / 1e9 - found[0]
    full, sliding = source.config.full_layers, source.config.sliding_layers
    assert with_keys == pytest.approx(2048e-9 * (100_000 * full + 128 * sliding))
    packed = step_bytes(sizes, source.config, 1, 100_000, 2, kv_bits=8) / 1e9 - found[0]
    assert packed == pytest.approx(2048e-9 * (100_000 * full * 9 / 16 + 128 * sliding))


def test_counted_bytes_are_those_of_the_checkpoint(mini, backend_module):
    source = checkpoint.open(mini / "mlx-4bit")
    counted = CountedWeights(source)
    backend_module("mlx").load(counted, device="cpu", dtype="float32", limits=Limits(1, 64, 64)).close()
    assert sum(counted.sizes.values()) == source.size_bytes


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_report_of_every_case(backend, backend_module):
    backend_module(backend)
    source = Synthetic(TINY, "mxfp4")
    cases = [Case(1, 16, 16, 4), Case(2, 16, 150, 4)]
    said = []
    target = Target.find(backend, "cpu", None)
    report = bench(BenchModel(source, source.size_bytes, "mxfp4"), cases, target, repeat=2, log=said.append)
    assert not report.agreements and report.ratio is None and said
    for case, result in zip(cases, report.results, strict=True):
        assert (result.engine, result.backend, result.device) == ("mlx-gptoss", backend, "cpu")
        assert (result.batch, result.prompt, result.context) == (case.batch, case.prompt, case.context)
        assert result.prefill_tok_s > 0 and result.decode_tok_s > 0 and result.peak_memory_bytes > 0
        assert result.bytes_per_token * case.batch == result.bytes_per_step
        assert 1 < result.bandwidth_gb_s < 10_000
        flops = result.prefill_tok_s / case.prompt * prefill_flops(TINY, case.prompt)
        assert result.fraction_of_sgemm == pytest.approx(flops / report.cpu.sgemm_gflops / 1e9)
        share = result.decode_tok_s * result.bytes_per_token / result.bandwidth_gb_s / 1e9
        assert result.fraction_of_bound == pytest.approx(share) and share < 1


def test_the_arithmetic_of_a_prompt():
    """Of 20b: two for each active weight and token, lm_head once, and attention by hand."""
    config = PRESETS["20b"]
    attention, experts = 2880 * 5120 + 4096 * 2880, 4 * 3 * 2880 * 2880
    matrices = 24 * 2 * (attention + 2880 * 32 + experts)
    lm_head = 2 * 201_088 * 2880
    assert prefill_flops(config, 1) == matrices + lm_head + 24 * 4 * 4096
    seen = 12 * sum(n + 1 for n in range(200)) + 12 * sum(min(n + 1, 128) for n in range(200))
    assert prefill_flops(config, 200) == 200 * matrices + lm_head + 4 * 4096 * seen


def test_what_cannot_be_run_is_refused(backend_module):
    target = Target.find("mlx", "cpu", None)
    source = Synthetic(TINY, "mxfp4")
    with pytest.raises(InvalidRequest, match="at most"):
        bench(BenchModel(source, source.size_bytes, "mxfp4"), [Case(1, 8, TINY.max_position_embeddings, 8)], target)
    with pytest.raises(DoesNotFit):
        bench(BenchModel(source, 10**15, "mxfp4"), [Case(1, 8, 8, 8)], target)


@pytest.mark.parametrize("backend", BACKENDS)
def test_narrow_activations_agree_with_float32(backend, backend_module):
    module = backend_module(backend)
    source = Synthetic(preset("tiny", layers=6), "mxfp4")
    found = agreement.with_cpu_float32(module, source, backend, "cpu", "bfloat16", [1, 4])
    assert found.layers == agreement.LAYERS
    assert 1e-7 < found.kl < 0.05 and 0 < found.decode_error < 0.5 and found.top1 > 0.8
    exact = agreement.with_cpu_float32(module, source, backend, "cpu", "float32", [1, 4])
    assert exact.kl < 1e-9 and exact.decode_error < 1e-4


class Wrong:
    """A backend whose second copy of the model, the oracle, has other weights."""

    def __init__(self, module, target):
        self.module, self.target, self.loaded = module, target, 0
        self.prefill_chunk = module.prefill_chunk

    def load(self, source, **options):
        self.loaded += 1
        runner = self.module.load(source, **options)
        if self.loaded == 2:
            return runner
        if self.target == "prefill":
            right = runner.logits
            runner.logits = lambda ids, adapter: np.roll(right(ids, adapter), 1, axis=-1)
        else:
            right = runner.submit
            runner.submit = lambda rows: right([replace(row, start=row.start - (row.tokens is None)) for row in rows])
        return runner


@pytest.mark.parametrize("target", ["prefill", "decode"])
def test_a_model_with_wrong_logits_is_not_timed(backend_module, target):
    source = Synthetic(TINY, "mxfp4")
    with pytest.raises(GptOssError, match="nothing was timed"):
        agreement.with_cpu_float32(Wrong(backend_module("mlx"), target), source, "mlx", "cpu", "float32", [2, 3])


def test_first_layers_are_those_of_the_model(mini):
    source = checkpoint.open(mini / "mxfp4")
    first = FirstLayers(source, 2)
    assert first.config.num_hidden_layers == 2 and first.config.layer_types == source.config.layer_types[:2]
    assert first.read("layers.1.router.bias") is not None


def test_sizes_of_synthetic_weights_in_other_formats():
    source = Synthetic(TINY, "bf16")
    assert api.sizes_in_other_formats(source)["bf16"] == source.size_bytes
