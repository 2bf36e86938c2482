"""The checks of whole steps on a runner, with random weights at the widths of gpt-oss in two layers, one of each kind,
and the speeds that say whether this machine is as fast as it should be."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import partial

import numpy as np

from ..backends.base import Limits, Pending, Row, Runner, Sampled
from ..config import GPT_OSS_20B, TINY, ModelConfig
from ..loading.plan import ACTIVATION_BYTES
from ..sampling import Sampling
from ..weights.synthetic import Synthetic
from . import agreement, benchmark
from .benchmark import BenchModel, Target
from .costs import step_bytes
from .selftest import REPORT, Check, Compared, Machine, Measured, Outcome, Skipped
from .timing import Case

GREEDY = Sampling(temperature=0)
WORDS, END = 4096, 4000  # the vocabulary, and the id that ends a text
LENGTHS = (137, 5, 64, 1)  # of the prompts of a batch; one is longer than the sliding window
DECODED = 6
LAUNCHES = 1000
STEPS = 50  # pipelined, of the check that keys and values are written in place
LONG = 16384  # tokens of its cache with two layers; with more, the cache has the same size in all
STEPS_TIMED, TIMES = 8, 3


def checks(machine: Machine) -> Iterator[Check]:
    """All of them; the measured speeds come last."""
    cpu = f"use --device cpu, or another --dtype; {REPORT}"
    yield Check("whole steps, prompt and decoding", partial(_whole_steps, machine), cpu)
    yield Check("sequences of a batch", partial(_batch, machine), f"serve with --slots 1; {REPORT}")
    yield Check("prefix cache, save and restore", partial(_snapshots, machine), f"use --prefix-cache 0; {REPORT}")
    yield Check("K/V written in place", partial(_in_place, machine), f"use a smaller --max-context; {REPORT}")
    yield Check("speed, copies of memory", partial(_copies, machine))
    yield Check("speed, small operations", partial(_launches, machine))
    yield Check("speed, a decode step", partial(_decode_step, machine))


def _weights(machine: Machine) -> Synthetic:
    """Two layers of gpt-oss-20b with a short vocabulary; on a CPU, with a quarter of the experts."""
    experts = GPT_OSS_20B.num_local_experts if machine.kernels.on_gpu else 8
    config = ModelConfig(
        num_hidden_layers=2, num_local_experts=experts, vocab_size=WORDS, eos_token_id=(END,), pad_token_id=None
    )
    return Synthetic(config, "mxfp4")


def _load(machine: Machine, weights: Synthetic, slots: int, context: int) -> Runner:
    limits = Limits(slots, context, min(256, machine.module.prefill_chunk(machine.device)))
    return machine.module.load(weights, device=machine.device, dtype=machine.dtype, limits=limits)


def _whole_steps(machine: Machine) -> Iterator[Outcome]:
    """On a CPU in float32 the other computation differs, too: whole prompts instead of decoded tokens."""
    dtype, batches = machine.kernels.dtype, [1, 2, 16] if machine.kernels.on_gpu else [2]
    found = agreement.compare_with_cpu(
        machine.module, _weights(machine), machine.backend, machine.device, dtype, batches
    )
    kl, decode = agreement.TOLERANCE[dtype]
    yield Compared("KL divergence of a prompt, nats", found.kl, kl)
    yield Compared("log-probabilities of decoded tokens", found.decode_error or 0.0, decode)


def _batch(machine: Machine) -> Iterator[Outcome]:
    """Four sequences of unequal lengths in one step, and each of them alone."""
    rng = np.random.default_rng(20)
    texts = [tuple(rng.integers(0, END, length + DECODED).tolist()) for length in LENGTHS]
    runner = _load(machine, _weights(machine), len(LENGTHS), max(LENGTHS) + DECODED + 1)
    try:
        together = _follow(runner, texts, range(len(texts)))
        limit = agreement.TOLERANCE[machine.kernels.dtype][1]
        for row, length in enumerate(LENGTHS):
            (alone,) = _follow(runner, texts, [row])
            error = max(abs(a.logprob - b.logprob) for a, b in zip(alone, together[row], strict=True))
            yield Compared(f"log-probabilities after {length} tokens", error, limit)
    finally:
        runner.close()


def _follow(runner: Runner, texts: Sequence[tuple[int, ...]], slots: Sequence[int]) -> list[list[Sampled]]:
    """What the model finds likeliest after each of the last tokens of a text, whose others are its prompt."""
    found: list[list[Sampled]] = [[] for _ in slots]
    for slot in slots:
        prompt = texts[slot][:-DECODED]
        runner.submit([Row(slot, 0, prompt, GREEDY, prompt)]).wait()
    for step in range(DECODED):
        rows = [Row(slot, at := len(texts[slot]) - DECODED + step, (texts[slot][at],), GREEDY) for slot in slots]
        for sequence, sampled in zip(found, runner.submit(rows).wait(), strict=True):
            assert sampled is not None
            sequence.append(sampled)
    for slot in slots:
        runner.release(slot)
    return found


def _snapshots(machine: Machine) -> Iterator[Outcome]:
    """A sequence, and its copy that was saved in parts, inside of steps and at their end, made bytes and restored
    into another slot: bit for bit."""
    prompt = tuple(np.random.default_rng(21).integers(0, END, 200).tolist())
    runner = _load(machine, _weights(machine), 2, 256)
    try:
        runner.submit([Row(0, 0, prompt[:182], save_at=(70, 136))]).wait()
        parts = [runner.save(0, 0, 70), runner.save(0, 70, 136)]
        runner.submit([Row(0, 182, prompt[182:199], save_at=(190, 199))]).wait()
        parts += [runner.save(0, 136, 190), runner.save(0, 190, 199)]
        chain = [runner.unpack(part.start, part.end, runner.pack(part)) for part in parts]
        runner.restore(1, chain)
        found = [_last_and_next(runner, slot, prompt) for slot in (0, 1)]
        different = sum(a.token != b.token for a, b in zip(*found, strict=True))
        yield Compared("tokens that differ", float(different), 0.5)
        error = max(abs(a.logprob - b.logprob) for a, b in zip(*found, strict=True))
        yield Compared("log-probabilities", error, 0.0)
    finally:
        runner.close()


def _last_and_next(runner: Runner, slot: int, prompt: tuple[int, ...]) -> list[Sampled]:
    """Feed a prompt's last token, then what is sampled."""
    rows = [Row(slot, len(prompt) - 1, prompt[-1:], GREEDY, prompt)]
    rows += [Row(slot, len(prompt) + n, None, GREEDY) for n in range(4)]
    return [sampled for row in rows for sampled in runner.submit([row]).wait() if sampled is not None]


def _in_place(machine: Machine) -> Iterator[Outcome]:
    """Steps that are submitted before the last one is read need no second cache. On a Mac's GPU the model has as many
    layers as it takes for a step to be cut into as many command buffers as one of gpt-oss."""
    if not machine.kernels.counts_memory:
        yield Skipped("all", "torch does not count its memory on a CPU")
        return
    layers = machine.kernels.layers_in_flight()
    config = replace(TINY, num_hidden_layers=layers, layer_types=(), num_attention_heads=8, num_key_value_heads=8)
    length = max(STEPS + 1, LONG * 2 // layers)
    runner = _load(machine, Synthetic(config, "mxfp4"), 4, length)
    try:
        runner.submit([Row(0, length - 1, (5,), GREEDY, (5,))]).wait()  # the cache has its full size
        cache = 4 * length * config.full_layers * 2 * config.kv_size * ACTIVATION_BYTES[machine.kernels.dtype]
        used = machine.kernels.reset_peak_memory()
        pending: Pending | None = None
        for step in range(STEPS):
            ahead = runner.submit([Row(0, length - STEPS + step, None, GREEDY)])
            if pending is not None:
                pending.wait()
            pending = ahead
        if pending is not None:
            pending.wait()
        more = machine.kernels.peak_memory() - used
        yield Compared(f"memory of {STEPS} steps of {layers} layers over that of the cache", more / cache, 0.5)
    finally:
        runner.close()


def _copies(machine: Machine) -> Iterator[Outcome]:
    yield Measured("copy bandwidth", machine.module.copy_bandwidth(machine.device) / 1e9, "GB/s, reads and writes")


def _launches(machine: Machine) -> Iterator[Outcome]:
    machine.kernels.launch_seconds(LAUNCHES)
    best = min(machine.kernels.launch_seconds(LAUNCHES) for _ in range(3))
    yield Measured("one of a chain", best * 1e6, "microseconds")


def _decode_step(machine: Machine) -> Iterator[Outcome]:
    """Two layers of the model above, with a context of 64 tokens, against the bytes that a step reads."""
    weights = _weights(machine)
    target = Target.find(machine.backend, machine.device, machine.dtype)
    case = Case(batch=1, prompt=64, context=64, generate=STEPS_TIMED)
    model = BenchModel(weights, weights.size_bytes, weights.format)
    bandwidth = machine.module.copy_bandwidth(machine.device)
    engine, counted = benchmark.load(model, [case], TIMES, target, lambda what: None)
    try:
        engine.begin(case)
        engine.prefill()
        engine.fill()
        seconds = min(engine.decode() for _ in range(TIMES)) / STEPS_TIMED
    finally:
        engine.close()
    size = step_bytes(counted.sizes, counted.config, 1, case.context, ACTIVATION_BYTES[target.dtype])
    yield Measured("one step", seconds * 1e3, "ms")
    yield Measured("share of the bound by bytes", 100 * size / bandwidth / seconds, "%")
