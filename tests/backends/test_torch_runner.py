"""The cuda backend's runner, on a CPU: copies to the device, scores in float32, devices that it takes, and closing."""

from __future__ import annotations

import pytest

pytest.importorskip("torch", reason="torch is not installed (pip install 'mlx-gptoss[cuda]')")

import torch
from torch.overrides import TorchFunctionMode

from mlx_gptoss.backends import cuda
from mlx_gptoss.backends.base import Limits, Row
from mlx_gptoss.errors import BackendUnavailable
from mlx_gptoss.sampling import Sampling
from mlx_gptoss.weights import checkpoint as checkpoints


def load(folder, **options):
    return cuda.load(checkpoints.open(folder), device="cpu", limits=Limits(4, 96, 64), **{"dtype": None, **options})


class HostValues(TorchFunctionMode):
    """Notes calls that bring Python values or ordinary host memory to a device, which waits for the device there."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def __torch_function__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        name = getattr(function, "__name__", str(function))
        if name in ("tensor", "as_tensor") and kwargs.get("device") is not None:
            self.found.append(name)
        if name in ("__getitem__", "__setitem__") and _has_list(args[1]):
            self.found.append(f"{name} {args[1]}")
        return function(*args, **kwargs)


def _has_list(index: object) -> bool:
    return isinstance(index, list) or (isinstance(index, tuple) and any(isinstance(part, list) for part in index))


def test_a_step_copies_through_page_locked_memory_alone(mini, monkeypatch):
    """Prompts, and rows with every option of the sampler, which go through sample.py."""
    runner = load(mini / "mxfp4")
    copies = []
    for name in ("runner", "cache", "sample"):
        module = __import__(f"mlx_gptoss.backends.cuda.{name}", fromlist=[name]).to_device
        monkeypatch.setattr(
            f"mlx_gptoss.backends.cuda.{name}.to_device", lambda t, d, do=module: copies.append(t) or do(t, d)
        )
    vocabulary = runner.config.vocab_size
    options = [
        Sampling(top_p=0.9, seed=1, logprobs=3),
        Sampling(top_k=5, min_p=0.1, repetition_penalty=1.2, seed=2),
        Sampling(temperature=0, logit_bias={5: 1.0}),
    ]
    prompt = (1, 2, 3, 4)
    with HostValues() as noted:
        rows = [Row(slot, 0, prompt, sampling, prompt) for slot, sampling in enumerate(options)]
        runner.submit([*rows, Row(3, 0, prompt)]).wait()
        mask = bytes([255]) * (-(-vocabulary // 8))
        rows = [Row(slot, len(prompt), None, sampling, mask=mask) for slot, sampling in enumerate(options)]
        runner.submit([*rows, Row(3, len(prompt), (7,))]).wait()
    assert noted.found == []
    assert len(copies) > 10


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_scores_stay_in_float32(mini, dtype):
    """Logits and router scores, which are compared with each other: in 16 bits close ones would be equal."""
    runner = load(mini / "mxfp4", dtype=dtype)
    scores = []
    model = runner._model
    mixture = type(model.blocks[0].mlp.ops).mixture
    seen = lambda self, x, s, *rest: scores.append(s) or mixture(self, x, s, *rest)  # noqa: E731
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(type(model.blocks[0].mlp.ops), "mixture", seen)
        logits = torch.from_numpy(runner.logits(range(40)))
    narrow = getattr(torch, dtype)
    assert logits.dtype == torch.float32 and (logits.to(narrow).float() != logits).float().mean() > 0.5
    assert all(s.dtype == torch.float32 and (s.to(narrow).float() != s).any() for s in scores) and scores


def test_close_ends_the_graphs_before_the_group_of_ranks(mini, monkeypatch):
    """NCCL waits for graphs that captured its operations, and would for ever."""
    runner, order = load(mini / "mxfp4"), []

    class Graphs:
        def __del__(self) -> None:
            order.append("graphs")

    runner._decoder = Graphs()
    monkeypatch.setattr(type(runner._model.ranks), "leave", lambda self: order.append("ranks"))
    runner.close()
    assert order == ["graphs", "ranks"]


@pytest.mark.parametrize(
    ("capability", "hip", "message"),
    [((7, 5), None, "compute capability 7.5.*needs 8.0"), ((9, 0), "6.2", "AMD"), ((8, 0), None, None)],
)
def test_devices_that_the_kernels_are_not_for(monkeypatch, capability, hip, message):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: capability)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda index: "A GPU")
    monkeypatch.setattr(torch.version, "hip", hip, raising=False)
    if message is None:
        assert cuda.pick_device(None) == torch.device("cuda", 0)
        return
    with pytest.raises(BackendUnavailable, match=message):
        cuda.pick_device(None)
    assert cuda.pick_device("cpu").type == "cpu"


def test_a_part_of_the_card_is_kept_back(monkeypatch):
    monkeypatch.setattr(cuda, "pick_device", lambda device: torch.device("cuda", 0))
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda where: (20 << 30, 25 << 30))
    assert cuda.available_memory(None) == 19 << 30
