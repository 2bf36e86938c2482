"""A custom kernel is used if it compiles and agrees with its twin, and the verdict is remembered. The kernels here are
stand-ins in MLX's own operations, which may be wrong."""

from __future__ import annotations

import json
import types
from collections import Counter

import mlx.core as mx
import numpy as np
import pytest
from click.testing import CliRunner
from mlx_gptoss_cli.show import show

from mlx_gptoss.api import NANO
from mlx_gptoss.backends import mlx as backend
from mlx_gptoss.backends.base import Limits
from mlx_gptoss.backends.mlx.kernels import choose
from mlx_gptoss.backends.mlx.kernels.attention import attend
from mlx_gptoss.backends.mlx.kernels.choose import Chooser, chooser, score_factor
from mlx_gptoss.backends.mlx.kernels.norm import add_norm
from mlx_gptoss.backends.mlx.kernels.selftest import checked_cases, random_layer
from mlx_gptoss.backends.mlx.kernels.verdicts import FILE_NAME, MAX_BYTES, MAX_MACHINES, UNFINISHED, Verdicts
from mlx_gptoss.config import TINY
from mlx_gptoss.measure import selftest, selftest_kernels
from mlx_gptoss.weights import checkpoint as checkpoints
from mlx_gptoss.weights.split import RankShard
from mlx_gptoss.weights.tensor import MXFP4

PROBLEM = "[metal::Device] Unable to build metal library from source\nprogram_source:12:3: error: no such thing"
CHECKS = {"attend": "attention, window", "add_norm": "norm"}


class StandIn:
    """mx.fast.metal_kernel for attention and norm. faults: by the kernel's name "wrong", "nan", or what it raises."""

    def __init__(self, **faults):
        self.faults = faults
        self.launches = Counter()

    def metal_kernel(self, name, **_):
        def launch(*, inputs, template, **_):
            self.launches[name] += 1
            fault = self.faults.get(name)
            if isinstance(fault, BaseException):
                raise fault
            found = getattr(self, name)(dict(template), *inputs)
            if fault is not None:
                found[0] = found[0] + (mx.nan if fault == "nan" else 0.2)
            return found

        return launch

    def attention(self, template, vectors, kv, scales, biases, sinks, slots, positions, factor):
        cached = [kv, scales, biases] if template["BITS"] == 8 else [kv]
        found = attend(vectors, cached, slots, positions, template["WINDOW"] or None, sinks, factor.item())
        return [found, None]

    def merge(self, template, partial, states, sinks):
        return [partial]

    def norm(self, template, product, residual, weight, epsilon):
        return list(add_norm(product, residual, weight, epsilon.item()))


@pytest.fixture
def stand_in(monkeypatch):
    def use(**faults) -> StandIn:
        found = StandIn(**faults)
        monkeypatch.setattr(mx.fast, "metal_kernel", found.metal_kernel)
        return found

    return use


@pytest.fixture
def choice(tmp_path):
    """choice(...) is a chooser of a machine with a folder of its own, and a layer's kernels."""

    def make(machine: str = "M4, macOS 15.5", dtype=mx.float32, **options):
        found = Chooser(TINY, dtype, score_factor(TINY), None, Verdicts(tmp_path, machine), **options)
        return found, found.layer(0, None, norm_apart=True)

    return make


@pytest.mark.parametrize("dtype", [mx.float32, mx.bfloat16, mx.float16])
def test_kernels_that_agree_are_used_and_remembered(stand_in, choice, tmp_path, dtype):
    stands = stand_in()
    found, kernels = choice(dtype=dtype)
    assert kernels.attend is not None and kernels.add_norm is not None and kernels.experts is None
    assert not found.reasons and all(case.error <= case.limit for _, case in found.cases)
    (verdicts,) = json.loads((tmp_path / FILE_NAME).read_text()).values()
    assert [*verdicts.values()] == ["", ""] and all(check.endswith(str(dtype).rpartition(".")[2]) for check in verdicts)
    before = stands.launches.total()
    assert before > 0
    found, kernels = choice(dtype=dtype)
    assert kernels.attend is not None and stands.launches.total() == before  # remembered
    found.layer(2, None, norm_apart=True)
    assert stands.launches.total() == before
    choice(dtype=dtype, repeat=True)
    assert stands.launches.total() == 2 * before
    choice("M4, macOS 15.6", dtype=dtype)
    assert stands.launches.total() == 3 * before


@pytest.mark.parametrize(
    ("fault", "reason"),
    [
        ("wrong", "it differs from MLX's own operations"),
        ("nan", "it differs from MLX's own operations"),
        (RuntimeError(PROBLEM), "it does not run: [metal::Device] Unable to build metal library from source"),
        (RuntimeError(), "it does not run: RuntimeError"),
        (ValueError("Thread group size (1024) is greater than the maximum"), "it does not run: Thread group size"),
    ],
)
@pytest.mark.parametrize("name", ["attention", "norm"])
def test_a_kernel_that_fails_is_left_out_and_named(stand_in, choice, name, fault, reason):
    stands = stand_in(**{name: fault})
    for _ in range(2):  # found, then remembered
        found, kernels = choice()
        assert (kernels.attend is None, kernels.add_norm is None) == (name == "attention", name == "norm")
        ((check, told),) = found.reasons.items()
        assert check.startswith(name) and told.startswith(reason) and "\n" not in told
        if not stands.launches:
            return
        stands.launches.clear()
    pytest.fail("it was checked again")


def test_an_update_of_the_system_checks_again(stand_in, choice):
    stand_in(norm="wrong")
    assert choice()[1].add_norm is None
    stand_in()
    assert choice()[1].add_norm is None
    assert choice("M4, macOS 15.6")[1].add_norm is not None
    assert choice(repeat=True)[1].add_norm is not None  # as selftest does
    assert choice()[1].add_norm is not None


def test_a_check_that_ended_the_program_is_not_tried_again(stand_in, choice):
    stand_in(norm=KeyboardInterrupt())
    with pytest.raises(KeyboardInterrupt):
        choice()
    stands = stand_in()
    found, kernels = choice()
    assert kernels.add_norm is None and [*found.reasons.values()] == [UNFINISHED] and not stands.launches["norm"]


@pytest.mark.parametrize(
    "content",
    [b"", b"{", b"[1]", b'{"M4, macOS 15.5": 3}', b'{"M4, macOS 15.5": {"norm, 192, float32": 7}}', b"{" * 9999],
)
def test_a_damaged_file_is_written_anew(stand_in, choice, tmp_path, content):
    stands = stand_in()
    (tmp_path / FILE_NAME).write_bytes(content)
    assert choice()[1].add_norm is not None and stands.launches["norm"]
    assert choice()[0].verdicts.find("norm, 192, float32") == ""


def test_a_huge_file_and_a_folder_that_cannot_be_written(stand_in, choice, tmp_path):
    stands = stand_in()
    (tmp_path / FILE_NAME).write_bytes(b" " * (MAX_BYTES + 1))
    assert choice()[1].add_norm is not None
    verdicts = Verdicts(tmp_path / FILE_NAME, "here")  # a file
    verdicts.put("norm", "")
    assert verdicts.all() == {} and stands.launches


def test_machines_seen_first_are_forgotten_first(tmp_path):
    for number in range(MAX_MACHINES + 3):
        Verdicts(tmp_path, f"machine {number}").put("norm", "")
        Verdicts(tmp_path, "machine 1").put("norm", "")
    kept = [number for number in range(MAX_MACHINES + 3) if Verdicts(tmp_path, f"machine {number}").all()]
    assert kept == [1, *range(4, MAX_MACHINES + 3)]


def test_sizes_without_a_kernel(stand_in, tmp_path):
    stand_in()
    config = TINY.__class__(**{**vars(TINY), "num_experts_per_tok": 33, "num_local_experts": 40})
    found = Chooser(config, mx.float32, 1.0, None, Verdicts(tmp_path, "here"))
    layer = found.layer(0, random_layer(TINY, MXFP4, mx.float32), norm_apart=False)
    assert layer.router is None and layer.experts is None and layer.add_norm is None and layer.attend is not None
    assert list(found.reasons.values()) == ["no kernel for these sizes"] * 2


def test_only_a_metal_gpu_has_them(monkeypatch):
    assert chooser(TINY, mx.float32, None, mx.Device(mx.cpu)) is None
    monkeypatch.setattr(mx.metal, "is_available", lambda: False)
    assert chooser(TINY, mx.float32, None, mx.Device(mx.gpu)) is None
    assert not list(checked_cases(TINY, mx.float32, mx.Device(mx.cpu)))
    assert backend.custom_kernels("cpu") == {}


def test_the_option_and_ranks_turn_them_off(monkeypatch):
    """load() asks for them unless they are turned off, or the model is one rank's part."""
    asked = []
    monkeypatch.setattr(backend, "chooser", lambda *arguments: asked.append(arguments))
    checkpoint = checkpoints.open(NANO)
    for limits, shard, wanted in (
        (Limits(1, 64, 64), None, 1),
        (Limits(1, 64, 64, custom_kernels=False), None, 0),
        (Limits(1, 64, 64), RankShard.of(checkpoint.config, 0, 1), 0),
    ):
        asked.clear()
        backend.load(checkpoint, device="cpu", dtype=None, limits=limits, shard=shard).close()
        assert len(asked) == wanted


def test_show_names_them(monkeypatch):
    found = {"norm, 2880, bfloat16": "", "router, 4 of 32 experts, bfloat16": "it does not run: no such thing"}
    monkeypatch.setattr(backend, "custom_kernels", lambda device: found)
    words = ["--backend", "mlx", "--device", "cpu"]
    out = CliRunner().invoke(show, words).output
    assert "Custom kernel (norm, 2880, bfloat16): in use\n" in out
    assert "Custom kernel (router, 4 of 32 experts, bfloat16): not used here, it does not run: no such thing\n" in out
    assert json.loads(CliRunner().invoke(show, [*words, "--json"]).output)["custom_kernels"] == found


def test_selftest_lists_and_fails_the_check(monkeypatch):
    kernels = types.SimpleNamespace(
        config=TINY, specs=(), has_custom_kernels=True,
        custom_kernels=lambda: iter([("norm, 2880: 1 rows", 1e-3, 1e-2), ("router: it does not run", np.inf, 1e-2)]),
    )  # fmt: skip
    check = next(iter(selftest_kernels.checks(types.SimpleNamespace(kernels=kernels))))
    result = selftest.run(check)
    assert check.name == "custom kernels" and not result.ok and result.worst.case == "router: it does not run"
    kernels.has_custom_kernels = False
    assert next(iter(selftest_kernels.checks(types.SimpleNamespace(kernels=kernels)))).name != check.name


def test_every_check_of_selftest(stand_in, monkeypatch, tmp_path):
    """The checks of all kernels, with those that have no stand-in named as failed."""
    stand_in()
    monkeypatch.setattr(choose, "verdicts_of", lambda device: Verdicts(tmp_path, "here"))
    monkeypatch.setattr(mx.metal, "is_available", lambda: True)
    cases = list(checked_cases(TINY, mx.float32, mx.Device(mx.gpu)))
    failed = {case.split(",")[0] for case, error, limit in cases if not error <= limit}
    assert failed == {"router", "experts"}
    passed = {case.split(":")[0] for case, error, limit in cases if error <= limit}
    assert {check.partition(",")[0] for check in passed} == {"attention", "norm"}
    assert any("keys in 8 bits" in check for check in passed)
    assert set(Verdicts(tmp_path, "here").all()) == {case.split(":")[0] for case, *_ in cases}
