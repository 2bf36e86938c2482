"""How prompts and decoding sequences share the time, with costs from a model of a device instead of a clock."""

from __future__ import annotations

import random
from collections import deque
from collections.abc import Callable, Sequence
from itertools import count, pairwise
from typing import Any, cast

import pytest

from mlx_gptoss.backends.base import Limits, Sampled
from mlx_gptoss.engine.pace import FIXED_TOKENS, Pace, Piece
from mlx_gptoss.engine.prefix import PrefixCache, SnapshotRunner
from mlx_gptoss.engine.request import Request
from mlx_gptoss.engine.scheduler import Scheduler
from mlx_gptoss.engine.sequence import Sequence as Running
from mlx_gptoss.engine.sequence import Step
from mlx_gptoss.sampling import Sampling

GREEDY = Sampling(temperature=0)
STAGES = 8


class Device:
    """Costs of steps in seconds: of a decoding row, and of a token in each stage. fixed: the tokens whose cost each
    stage of a chunk has on top."""

    def __init__(self, decode_s: float, stage_s: Sequence[float], fixed: int = FIXED_TOKENS) -> None:
        self.decode_s, self.stage_s, self.fixed = decode_s, tuple(stage_s), fixed

    def cost(self, step: Step) -> float:
        rows = len(step.rows) - len(step.pieces)
        pieces = sum((p.tokens + self.fixed) * sum(self.stage_s[p.first : p.end]) for p in step.pieces)
        return (self.decode_s if rows else 0.0) + pieces

    def chunk_s(self, tokens: int) -> float:
        return (tokens + self.fixed) * sum(self.stage_s)

    def stage_most_s(self, tokens: int) -> float:
        return (tokens + self.fixed) * max(self.stage_s)


class Run:
    """A scheduler whose steps take the time that the device says, one step ahead as in the engine's loop.

    cut: with a prefix cache that can keep nothing. log: each step with its end. ends: when the
    last stage of each prompt ended.
    """

    def __init__(
        self,
        device: Device,
        slots: int = 6,
        chunk: int = 256,
        cut: bool = False,
        noise: Callable[[], float] = lambda: 1.0,
    ) -> None:
        prefix = PrefixCache(0, cast(SnapshotRunner, None)) if cut else None
        self.scheduler = Scheduler(Limits(slots, 100_000, chunk), lambda slot: None, prefix, stages=STAGES)
        self.device, self.noise = device, noise
        self.now = 0.0
        self._numbers = count()
        self.log: list[tuple[float, Step]] = []
        self.ends: dict[int, float] = {}
        self._in_flight: deque[Step] = deque()

    def add(self, length: int, max_tokens: int = 1) -> Running:
        first = next(self._numbers)  # no two prompts begin alike
        return self.scheduler.add(Request(tuple(range(first, first + length)), max_tokens, GREEDY))

    def steps(self, count: int) -> None:
        for _ in range(count):
            step = self.scheduler.plan()
            if step is not None:
                self._in_flight.append(step)
            if len(self._in_flight) == 2 or step is None:
                self._read(self._in_flight.popleft())

    def until_prefilled(self, *sequences: Running) -> None:
        while not all(id(sequence) in self.ends for sequence in sequences):
            self.steps(1)

    def _read(self, step: Step) -> None:
        seconds = self.device.cost(step) * self.noise()
        self.now += seconds
        self.log.append((self.now, step))
        for sequence, row in zip(step.sequences, step.rows, strict=True):
            if row.prompt is not None:
                self.ends[id(sequence)] = self.now
        self.scheduler.record_cost(step, seconds)
        self.scheduler.process_results(step, [Sampled(1, 0.0) if row.sampling else None for row in step.rows])

    def gaps(self, sequence: Running, since: float) -> list[float]:
        """Seconds between the tokens of a sequence, from `since` on."""
        times = [end for end, step in self.log if end >= since and sequence in step.sequences]
        return [after - before for before, after in pairwise(times)]


def chunks_of(run: Run, sequence: Running) -> list[int]:
    """The sizes of a sequence's chunks; each one's stages are consecutive."""
    sizes: list[int] = []
    reached = STAGES
    for _, step in run.log:
        for owner, row in zip(step.sequences, step.rows, strict=True):
            if owner is sequence and row.tokens:
                first, end = row.stages or (0, STAGES)
                assert first == reached % STAGES
                sizes.extend([len(row.tokens)] if first == 0 else [])
                reached = end
    return sizes


def with_streams(device: Device, streams: int = 3, alone: int = 1000, **options: Any) -> tuple[Run, list[Running]]:
    """A run with streams that have decoded for a while, after a prompt that ran alone."""
    run = Run(device, **options)
    run.until_prefilled(run.add(alone))
    added = [run.add(2, max_tokens=90_000) for _ in range(streams)]
    run.steps(40)
    return run, added


DEVICES = {
    "a large model": Device(0.015, [0.00002] * STAGES),
    "a slow processor": Device(0.005, [0.00001, 0.00003, 0.0002, 0.00003, 0.00001, 0.00003, 0.0002, 0.000005]),
    "a fast prompt": Device(0.010, [0.000001] * STAGES),
}
GPU = Device(0.010, [0.000003, 0.000010] * (STAGES // 2), fixed=1000)  # a small chunk's tokens cost several times more


@pytest.mark.parametrize("name", DEVICES)
def test_a_long_prompt_delays_a_token_by_no_more_than_a_step_or_a_stage(name: str) -> None:
    device = DEVICES[name]
    run, streams = with_streams(device)
    began = run.now
    run.until_prefilled(run.add(6000))
    beside = run.now - began
    gaps = run.gaps(streams[0], began)
    stage = device.stage_most_s(256)
    assert max(gaps) < device.decode_s + max(device.decode_s, stage) * 1.05
    alone = 23 * device.chunk_s(256) + device.chunk_s(112)
    assert beside < 3 * alone + 24 * device.decode_s  # the prompt gets a third of the time, or a chunk every step
    decoded = device.decode_s * len(gaps)
    assert decoded > beside / 4  # and the streams keep theirs


def test_alone_a_chunk_is_computed_whole() -> None:
    run = Run(DEVICES["a slow processor"])
    run.until_prefilled(run.add(600))
    assert [(row.start, len(row.tokens or ()), row.stages) for _, step in run.log for row in step.rows] == [
        (0, 256, None),
        (256, 256, None),
        (512, 88, None),
    ]


@pytest.mark.parametrize("cut", [False, True])
def test_alone_chunks_are_as_large_with_the_prefix_cache_as_without(cut: bool) -> None:
    """Of 20,000 tokens 256 an expert, of 32 with 4 active, where chunks of 256 tokens gave 32."""
    run = Run(GPU, chunk=2048, cut=cut)
    prompt = run.add(20_000)
    run.until_prefilled(prompt)
    assert chunks_of(run, prompt) == [2048] * 9 + [1568]
    saved = {at for _, step in run.log for row in step.rows for at in row.save_at}
    assert saved == (set(range(256, 20_000, 256)) if cut else set())


@pytest.mark.parametrize(
    ("device", "size"), [(DEVICES["a large model"], 512), (DEVICES["a slow processor"], 256), (GPU, 256)]
)
def test_large_chunks_of_a_prompt_alone_delay_no_stream_afterwards(device: Device, size: int) -> None:
    """Their cost per token, on a GPU a third of a small chunk's, is not taken for that of the chunks beside streams,
    which are small, or larger where no stage is longer than a step. From the first one on, a token waits for no more
    than a step or a small chunk's stage."""
    run, streams = with_streams(device, alone=20_000, chunk=2048, cut=True)
    began, prompt = run.now, run.add(6144)
    run.until_prefilled(prompt)
    assert chunks_of(run, prompt) == [size] * (6144 // size)
    gaps = run.gaps(streams[0], began)
    assert max(gaps) < device.decode_s + max(device.decode_s, device.stage_most_s(256)) * 1.05
    assert run.now - began < 4 * 24 * device.chunk_s(256)


def test_beside_streams_chunks_are_larger_where_a_stage_stays_shorter_than_a_step() -> None:
    """Once a small chunk has been measured. The first prompt takes half of what the step holds, the next one half of
    the rest, so that a short one finds room."""
    device = Device(0.003, [0.000001] * STAGES)
    run, streams = with_streams(device, slots=8, chunk=2048, cut=True)
    began, prompts = run.now, [run.add(9000) for _ in range(3)]
    run.steps(4)
    asked, short = run.now, run.add(64)
    run.until_prefilled(short)
    assert run.now - asked < 10 * device.decode_s
    run.until_prefilled(*prompts)
    sizes = [chunks_of(run, prompt) for prompt in prompts]
    assert max(map(max, sizes)) == 1024 and {1024, 512, 256} <= {size for each in sizes for size in each}
    assert max(run.gaps(streams[0], began)) < 2.1 * device.decode_s


def test_what_a_prompt_computes_does_not_depend_on_the_streams() -> None:
    run, _ = with_streams(DEVICES["a large model"])
    prompt = run.add(600)
    run.until_prefilled(prompt)
    rows = [row for _, step in run.log for owner, row in zip(step.sequences, step.rows, strict=True) if owner is prompt]
    chunks: dict[tuple[int, int], list[int]] = {}
    for row in rows:
        first, end = row.stages or (0, STAGES)
        chunks.setdefault((row.start, len(row.tokens or ())), []).extend(range(first, end))
    assert list(chunks) == [(0, 256), (256, 256), (512, 88)]
    assert all(stages == list(range(STAGES)) for stages in chunks.values())
    assert len(rows) > 6


def test_prompts_share_their_time_and_a_short_one_overtakes_a_long_one() -> None:
    run, _ = with_streams(DEVICES["a large model"], chunk=1024, cut=True)
    began = run.now
    first, second = run.add(4000), run.add(4000)
    run.steps(20)
    short = run.add(64)
    asked = run.now
    run.until_prefilled(short)
    assert run.now - asked < 8 * DEVICES["a large model"].chunk_s(64)
    run.until_prefilled(first, second)
    ends = [run.ends[id(sequence)] - began for sequence in (first, second)]
    assert min(ends) > 0.9 * max(ends)


def test_a_short_prompt_waits_for_one_chunk_where_a_second_does_not_fit() -> None:
    device = DEVICES["a large model"]
    run, _ = with_streams(device, chunk=256)
    run.add(6000)
    run.steps(20)
    asked, short = run.now, run.add(64)
    run.until_prefilled(short)
    assert run.now - asked < 2.5 * (device.chunk_s(256) + device.chunk_s(64))


def test_begun_chunks_never_exceed_the_limit() -> None:
    run, _ = with_streams(DEVICES["a slow processor"], slots=8, chunk=300)
    for length in (700, 90, 1, 500, 33):
        run.add(length, max_tokens=20)
    for _ in range(800):
        run.steps(1)
        begun = [s.chunk for s in run.scheduler._prefilling if s.stage]
        assert sum(begun) <= 300
    assert not run.scheduler._prefilling


@pytest.mark.parametrize("seed", range(5))
def test_costs_are_found_in_noise_and_after_a_pause(seed: int) -> None:
    """One step of fifty takes twenty times as long; the gaps of the others stay short."""
    rng = random.Random(seed)
    device = DEVICES["a slow processor"]
    run, streams = with_streams(device, noise=lambda: rng.uniform(0.8, 1.2) * (20 if rng.random() < 0.02 else 1))
    began = run.now
    run.until_prefilled(run.add(20_000))
    gaps = sorted(run.gaps(streams[0], began))
    assert gaps[int(0.9 * len(gaps))] < 1.5 * (device.decode_s + max(device.decode_s, device.stage_most_s(256)))


def test_a_step_that_became_cheaper_or_dearer_is_noticed() -> None:
    run, streams = with_streams(Device(0.02, [0.00001] * STAGES))
    run.add(90_000)
    run.steps(100)
    run.device = Device(0.004, [0.00001] * STAGES)
    run.steps(200)
    began = run.now
    run.steps(200)
    assert max(run.gaps(streams[0], began)) < 2.1 * 0.004


def test_before_any_measurement_a_step_takes_one_stage() -> None:
    run = Run(DEVICES["a large model"])
    run.add(2, max_tokens=100)
    assert run.scheduler.plan() is not None
    run.add(300)
    sizes = [run.scheduler.plan() for _ in range(12)]
    pieces = [piece for step in sizes if step is not None for piece in step.pieces]
    assert pieces[:STAGES] == [Piece(256, n, n + 1) for n in range(STAGES)]


def test_a_chunk_of_one_token_is_not_cut() -> None:
    pace = Pace(STAGES)
    assert pace.fit(1, 0, 0.0, at_least_one=True) == (Piece(1, 0, STAGES), 0.0)
    assert pace.fit(1, 0, 0.0, at_least_one=False) is None
    assert pace.fit(2, 3, 0.0, at_least_one=True) == (Piece(2, 3, 4), 0.0)
