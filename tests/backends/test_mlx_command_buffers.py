"""The limits on Metal's command buffers, without a Mac: chips, memory and models that are not here, MLX's rule on real
graphs, and how far a host may run ahead."""

from __future__ import annotations

import os
from dataclasses import replace

import mlx.core as mx
import pytest

from mlx_gptoss.backends import mlx as backend
from mlx_gptoss.backends.base import Limits, Row
from mlx_gptoss.backends.mlx import command_buffers
from mlx_gptoss.backends.mlx.command_buffers import (
    IN_FLIGHT,
    LARGER,
    MAX_ACTIVE_TASKS,
    MB,
    MIN_BUFFERS,
    MIN_LAUNCHES_PER_LAYER,
    MLX_LIMITS,
    OPS,
    BufferLimits,
    Setting,
    apply,
    chip_generation,
    choose,
    count_buffers,
    layers_for,
    limits_in_force,
    loaded_elements,
    must_take_turns,
    stored_elements,
)
from mlx_gptoss.backends.mlx.elementwise import UNCOMPILED
from mlx_gptoss.backends.mlx.launches import VIEWS, launches_per_token, traced
from mlx_gptoss.backends.mlx.load import load_model
from mlx_gptoss.backends.mlx.runner import MlxRunner
from mlx_gptoss.backends.mlx.wiring import Wiring
from mlx_gptoss.config import TINY
from mlx_gptoss.loading.plan import LoadRequest, open_source, plan_load
from mlx_gptoss.loading.step_reads import resident_bytes, step_reads
from mlx_gptoss.sampling import Sampling
from mlx_gptoss.weights import checkpoint as checkpoints
from mlx_gptoss.weights.requantize import Requantized
from mlx_gptoss.weights.synthetic import Synthetic, preset

GREEDY = Sampling(temperature=0)
ULTRA = MLX_LIMITS["d"]


def published(name: str, form: str = "mxfp4", context: int | None = None):
    weights = Synthetic(preset(name), form)
    return step_reads(weights, "mlx"), resident_bytes(weights, context, 1)


def chosen(chip: str, gigabytes: int, name: str = "20b", form: str = "mxfp4", environ=None, context=None) -> Setting:
    return choose(chip, gigabytes << 30, *published(name, form, context), environ or {})


@pytest.mark.parametrize("chip", ["Apple M1", "Apple M2 Pro", "Apple M3 Ultra", "Apple M4 Max"])
def test_chips_that_gain_get_larger_buffers(chip):
    assert chosen(chip, 64).limits == BufferLimits(200, 250)
    assert chosen(chip, 128, "120b").limits == BufferLimits(1000, 800)


@pytest.mark.parametrize("chip", ["Apple M5", "Apple M5 Max", "Apple M6", "Intel(R) Xeon(R)", "", "Apple A18 Pro"])
def test_other_chips_keep_what_mlx_has(chip):
    found = chosen(chip, 128)
    assert found.limits is None and found.why


def test_what_the_user_has_set_stays():
    for name, value in ((OPS, "100"), (MB, "0")):
        found = chosen("Apple M4 Max", 128, environ={name: value})
        assert found.limits is None and f"{name}={value}" in found.why


def test_a_mac_with_little_memory_beside_the_model_keeps_small_buffers():
    """Temporary arrays of all buffers in flight have to fit: 5.8 GB of them with 250 MB. And the whole context."""
    assert chosen("Apple M4", 16, form="mlx-mxfp4-q4").limits is None
    assert "2.9 GB" in chosen("Apple M4", 16).why
    assert chosen("Apple M4 Pro", 24).limits is None
    assert chosen("Apple M4 Pro", 24, context=8192).limits == BufferLimits(200, 125)
    assert chosen("Apple M4 Pro", 32).limits == BufferLimits(200, 250)
    assert chosen("Apple M4 Max", 96, "120b").limits is None
    for gigabytes in (16, 24, 32, 48, 64, 96, 128, 192, 512):
        for name in ("20b", "120b"):
            limits = chosen("Apple M3 Ultra", gigabytes, name).limits
            if limits is not None:
                needed = published(name)[1] + IN_FLIGHT * limits.mb * 2**20 * 2
                assert needed <= gigabytes * 2**30 * 2 / 3


@pytest.mark.parametrize("form", ["mxfp4", "bf16", "mlx-4bit", "mlx-8bit", "mlx-mxfp4-q8", "mlx-mxfp4-q4", "nvfp4"])
@pytest.mark.parametrize("name", ["20b", "120b"])
def test_every_choice_keeps_13_buffers_and_saves_some(name, form):
    reads, size = published(name, form)
    limits = choose("Apple M3 Ultra", 512 << 30, reads, size, {}).limits
    elements = [stored_elements(*read) for read in reads]
    if limits is None:
        assert all(count_buffers(elements, 0, each) >= count_buffers(elements, 0, ULTRA) for each in LARGER)
    else:
        assert MIN_BUFFERS <= count_buffers(elements, 0, limits) < count_buffers(elements, 0, ULTRA)
        assert not must_take_turns(elements, limits)


def test_the_published_models():
    """METAL figures: some 50 buffers a token for 20b by MLX's limits, 14 by ours; 120b 74 and 19."""
    for name, launches, own, ours in (("20b", 416, 49, 14), ("120b", 620, 74, 19)):
        elements = [stored_elements(*read) for read in published(name)[0]]
        limits = chosen("Apple M4 Max", 128, name).limits
        assert (count_buffers(elements, launches, ULTRA), count_buffers(elements, launches, limits)) == (own, ours)


def test_small_and_pruned_models_are_left_alone():
    """A fifth of the experts would leave too few buffers with 250 MB."""
    for config in (TINY, replace(preset("20b"), num_local_experts=8)):
        weights = Synthetic(config, "mxfp4")
        limits = choose("Apple M4 Max", 128 << 30, step_reads(weights, "mlx"), weights.size_bytes, {}).limits
        assert limits is None or limits.mb < 250


def test_more_context_never_means_fewer_buffers():
    weights = Synthetic(preset("20b"), "mxfp4")
    for limits in (ULTRA, *LARGER):
        counts = [
            count_buffers([stored_elements(*read) for read in step_reads(weights, "mlx", context)], 0, limits)
            for context in (0, 1024, 32768, 131072)
        ]
        assert counts == sorted(counts)


@pytest.mark.parametrize(
    "form", ["mxfp4", "mlx-4bit", "mlx-mxfp4-q8", "fp8-dynamic", "nvfp4", "bf16", "int4-autoround"]
)
def test_the_headers_say_what_is_loaded(mini, form):
    """The elements planned from headers are those of the arrays that MLX then has, but for factors per row."""
    if not (mini / form).exists():
        pytest.skip(f"there is no small {form}")
    source = checkpoints.open(mini / form)
    planned = [stored_elements(*read) for read in step_reads(source, "mlx")]
    with mx.stream(mx.Device(mx.cpu)):
        loaded = loaded_elements(load_model(source, mx.bfloat16, UNCOMPILED))
    assert len(planned) == len(loaded)
    assert all(a <= b <= 1.1 * a for a, b in zip(planned, loaded, strict=True))


def test_weights_quantized_while_loading_count_as_they_will_be(mini):
    source = Requantized(checkpoints.open(mini / "mxfp4"), "rest-8bit")
    with mx.stream(mx.Device(mx.cpu)):
        loaded = loaded_elements(load_model(source, mx.bfloat16, UNCOMPILED))
    assert [stored_elements(*read) for read in step_reads(source, "mlx")] == loaded


def graph_buffers(checkpoint, ops: int, elements: int) -> tuple[int, int]:
    """Buffers and launches of a decode step by MLX's rule on the graph itself, `elements` in place of megabytes."""
    cpu, events = mx.Device(mx.cpu), []
    with mx.stream(cpu), traced():
        runner = MlxRunner(load_model(checkpoint, mx.bfloat16, UNCOMPILED), Limits(1, 128, 64), cpu)
        mx.eval(runner.build([Row(0, 0, (1,), GREEDY, (1,))]).arrays)
        mx.export_function(events.append, lambda: list(runner.build([Row(0, 1, (1,), GREEDY)]).arrays))
    root: dict[str, str] = {}  # of a view: the array that it looks at

    def base(name: str) -> str:
        return base(root[name]) if name in root else name

    buffers, launches, done, size, seen = 1, 0, 0, 0, set()
    for event in events:
        if event["type"] != "primitive":
            continue
        in_place = event["name"] == "SliceUpdate"
        if event["name"] in VIEWS or in_place:
            root |= {output[0]: event["inputs"][0][0] for output in event["outputs"]}
        if event["name"] in VIEWS:
            continue
        launches, done = launches + 1, done + 1
        for name, shape, _ in (*event["inputs"], *event["outputs"]):
            if base(name) not in seen:
                seen.add(base(name))
                total = 1
                for extent in shape:
                    total *= extent
                size += total
        if done > ops or size > elements:
            buffers, done, size, seen = buffers + 1, 0, 0, set()
    return buffers, launches


@pytest.mark.parametrize("form", ["mxfp4", "mlx-4bit"])
def test_the_estimate_follows_the_graph(form):
    """At several limits, in elements for a model whose weights are small. The estimate leaves activations out."""
    checkpoint = Synthetic(replace(TINY, num_hidden_layers=8, layer_types=(), num_local_experts=32), form)
    per_read = [stored_elements(*read) for read in step_reads(checkpoint, "mlx", context=128)]
    scaled = [size << 20 for size in per_read]  # so that `mb` counts single elements
    whole = sum(per_read)
    for ops, part in ((10_000, 4), (10_000, 9), (20, 1), (50, 9)):
        exact, launches = graph_buffers(checkpoint, ops, whole // part)
        estimate = count_buffers(scaled, launches, BufferLimits(ops, whole // part))
        assert count_buffers(scaled, 0, BufferLimits(ops, whole // part)) <= exact
        assert abs(estimate - exact) <= max(1, exact // 8), (ops, part, estimate, exact)


def host_copies(buffers: int, shift: int = 0) -> bool:
    """Whether a host that is as fast as MLX lets it be would find a layer's reader of the last step still running.

    The device runs nothing before the host has to wait for it. shift: by how many buffers the borders of the second
    step are earlier."""
    for reader in range(buffers):  # the buffer with the reader of some layer's cache
        active: list[int] = []  # committed in the first step (numbers), then in the second one (-1)
        for number in range(buffers - 1):  # the last one is committed by the end of the step, and not counted
            active.append(number)
            while len(active) > MAX_ACTIVE_TASKS:
                active.pop(0)
        for _ in range(max(0, reader - shift)):  # the second step, up to the same layer's write
            active.append(-1)
            while len(active) > MAX_ACTIVE_TASKS:
                active.pop(0)
        if reader in active or (reader == buffers - 1 and active[-MAX_ACTIVE_TASKS:].count(-1) < MAX_ACTIVE_TASKS):
            return True
    return False


def test_13_buffers_are_enough_and_the_least():
    assert not host_copies(MIN_BUFFERS, shift=1)
    assert host_copies(MIN_BUFFERS - 1, shift=1)
    assert all(host_copies(few) for few in range(1, MAX_ACTIVE_TASKS + 1))


def test_the_variables_are_there_when_the_device_is_used_and_not_later():
    environ = {MB: "77", "HOME": "x"}
    seen = []
    apply(BufferLimits(200, 250), environ, lambda: seen.append(dict(environ)))
    assert seen == [{OPS: "200", MB: "250", "HOME": "x"}]
    assert environ == {MB: "77", "HOME": "x"}

    def fails():
        raise RuntimeError("no Metal device")

    with pytest.raises(RuntimeError):
        apply(BufferLimits(200, 250), environ, fails)
    assert environ == {MB: "77", "HOME": "x"}


def test_limits_in_force():
    assert limits_in_force("applegpu_g16s", {}) == BufferLimits(50, 50)
    assert limits_in_force("applegpu_g15d", {OPS: "300"}) == BufferLimits(300, 50)
    assert limits_in_force("applegpu_g13g", {OPS: " 7x", MB: "x"}) == BufferLimits(7, 0)  # as atoi reads them
    assert limits_in_force("", {}) == BufferLimits(40, 40)


def test_nothing_is_set_here(mini):
    """This is no Mac, or MLX's device is the CPU."""
    before = dict(os.environ)
    backend.prepare("cpu", *published("20b"))
    assert command_buffers.current_setting().limits is None and dict(os.environ) == before


@pytest.mark.parametrize(
    ("name", "generation"),
    [
        ("Apple M1", 1),
        ("Apple M4 Max", 4),
        ("Apple M1 (Virtual)", 1),
        ("Apple M12 Ultra", 12),
        ("Apple", None),
        ("", None),
    ],
)
def test_generations(name, generation):
    assert chip_generation(name) == generation


def test_layers_that_have_13_buffers_by_their_launches():
    """For the self-test, whose model is too small for the rule of sizes. A layer has more launches than is assumed."""
    few, more = (
        launches_per_token(Synthetic(replace(TINY, num_hidden_layers=n, layer_types=()), "mxfp4")) for n in (2, 6)
    )
    assert (more - few) / 4 >= MIN_LAUNCHES_PER_LAYER
    for limits in (ULTRA, *LARGER):
        layers = layers_for(limits)
        assert count_buffers([0] * 5 * layers, MIN_LAUNCHES_PER_LAYER * layers, limits) >= MIN_BUFFERS


class Recorder:
    """Stands in for mx.eval and mx.async_eval, and notes the order."""

    def __init__(self, monkeypatch) -> None:
        self.log: list[str] = []
        wait, start = mx.eval, mx.async_eval
        monkeypatch.setattr(mx, "eval", lambda *a: (self.log.append("wait"), wait(*a))[1])
        monkeypatch.setattr(mx, "async_eval", lambda *a: (self.log.append("start"), start(*a))[1])


@pytest.mark.parametrize(("in_turn", "order"), [(True, ["start", "wait", "start"]), (False, ["start", "start"])])
def test_steps_in_turn_wait_for_the_one_before(mini, monkeypatch, in_turn, order):
    cpu = mx.Device(mx.cpu)
    with mx.stream(cpu):
        model = load_model(checkpoints.open(mini / "mxfp4"), mx.float32, UNCOMPILED)
    runner = MlxRunner(model, Limits(1, 64, 64), cpu, in_turn=in_turn)
    recorder = Recorder(monkeypatch)
    steps = [runner.submit([Row(0, 0, (1, 2), GREEDY, (1, 2))]), runner.submit([Row(0, 2, None, GREEDY)])]
    assert recorder.log == order
    tokens = [step.wait()[0].token for step in steps]
    assert tokens == [int(runner.logits([1, 2])[-1].argmax()), int(runner.logits([1, 2, tokens[0]])[-1].argmax())]
    runner.close()


class Memory:
    """What Wiring calls of mlx.core."""

    def __init__(self) -> None:
        self.limit = 0

    def synchronize(self):
        pass

    clear_cache = synchronize

    def get_active_memory(self):
        return 14 * 10**9

    def set_wired_limit(self, limit):
        before, self.limit = self.limit, limit
        return before


@pytest.mark.parametrize("crowded", [False, True])
def test_a_model_on_metal_is_wired_and_takes_turns_where_it_must(mini, monkeypatch, crowded):
    """crowded: the process has limits that leave this model too few buffers, as those of a larger model before it."""
    cpu, memory = mx.Device(mx.cpu), Memory()
    with mx.stream(cpu):
        model = load_model(checkpoints.open(mini / "mxfp4"), mx.float32, UNCOMPILED)
    large = command_buffers.loaded_elements(model)
    monkeypatch.setattr(command_buffers, "loaded_elements", lambda model: [size << 12 for size in large] * 8)
    if crowded:
        monkeypatch.setattr(command_buffers, "_setting", Setting(BufferLimits(1000, 100_000), "for another model"))
    streams = backend.CpuStreams()
    runner = backend.metal_runner(model, Limits(1, 64, 64), cpu, streams, "applegpu_g16s", 11 * 10**9, Wiring(memory))
    assert memory.limit == 11 * 10**9
    recorder = Recorder(monkeypatch)
    runner.submit([Row(0, 0, (1, 2), GREEDY, (1, 2))])
    runner.submit([Row(0, 2, None, GREEDY)]).wait()
    assert recorder.log[:3] == (["start", "wait", "start"] if crowded else ["start", "start", "wait"])
    runner.close()
    assert memory.limit == 0


def test_selftest_names_the_limits():
    elements = tuple(stored_elements(*read) for read in published("20b")[0])
    ours = Setting(BufferLimits(200, 250), "for an M4", elements)
    assert command_buffers.describe(ours, BufferLimits(200, 250)) == {
        "ops": 200, "mb": 250, "set_by": "mlx-gptoss", "why": "for an M4", "least_a_token": 14, "enough": True,
    }  # fmt: skip
    users = command_buffers.describe(Setting(None, f"{MB}=2000 in the environment", elements), BufferLimits(50, 2000))
    assert users["set_by"] == "mlx or the environment" and not users["enough"] and users["least_a_token"] < MIN_BUFFERS


def test_the_limits_are_set_before_the_device_is_asked_for_its_memory(mini, monkeypatch):
    order, prepared, asked = [], backend.prepare, backend.available_memory
    monkeypatch.setattr(backend, "prepare", lambda *a: (order.append(("prepare", *a)), prepared(*a))[1])
    monkeypatch.setattr(backend, "available_memory", lambda device: (order.append(("asked",)), asked(device))[1])
    request = LoadRequest(model=str(mini / "mxfp4"), backend="mlx", device="cpu", max_context=64, slots=2)
    source = open_source(request)
    plan_load(request, source)
    assert [name for name, *_ in order] == ["prepare", "asked"]
    _, device, reads, resident = order[0]
    assert device == "cpu" and reads == step_reads(source, "mlx")
    config = source.config
    assert resident == source.size_bytes + 2 * 64 * config.full_layers * 2 * config.kv_size * 2
    plan_load(request, source, rank=0, ranks=2)  # the sums of several ranks end command buffers
    assert [name for name, *_ in order] == ["prepare", "asked", "asked"]
