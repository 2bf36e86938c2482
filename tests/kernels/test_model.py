"""The whole model through the kernels, against the reference's logits and text, and against the plain torch backend."""

from __future__ import annotations

import shutil
import subprocess
import sys
from dataclasses import replace
from importlib import import_module
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file

from mlx_gptoss.backends import cuda
from mlx_gptoss.backends.base import Limits, Row
from mlx_gptoss.backends.cuda.kernels import fused
from mlx_gptoss.backends.cuda.plain import TorchOperations
from mlx_gptoss.backends.cuda.quantized_kv import pack
from mlx_gptoss.errors import CheckpointError
from mlx_gptoss.sampling import Sampling
from mlx_gptoss.weights import checkpoint as checkpoints

GREEDY = Sampling(temperature=0)
FIXTURES = {
    "mxfp4": "reference",
    "mxfp4-original": "reference",
    **{name: f"{name}.reference" for name in ("nvfp4", "fp8-dynamic", "int4-autoround", "mlx-4bit", "mlx-mxfp4-all")},
    "gguf/model-q8_0.gguf": "gguf-q8_0.reference",
}


def load(folder, device, limits: Limits, kernels: bool = True):
    return cuda.load(checkpoints.open(folder), device=str(device), dtype="float32", limits=limits, kernels=kernels)


@pytest.mark.parametrize(
    "name", [name if name in ("mxfp4", "mlx-4bit") else pytest.param(name, marks=pytest.mark.slow) for name in FIXTURES]
)
def test_logits_of_every_format(mini, device, relative_error, name):
    """A prefill in two chunks; the length of the second does not divide the window."""
    reference = load_file(mini / f"{FIXTURES[name]}.safetensors")
    runner = load(mini / name, device, Limits(1, 96, 16))
    assert relative_error(runner.logits(reference["prompt"][:30].tolist()), reference["logits"][:30]) < 1e-4


def test_greedy_text(mini, device):
    """One sequence, so one row a step, at positions where the ring has wrapped several times."""
    reference = load_file(mini / "reference.safetensors")
    prompt, wanted = tuple(reference["prompt"].tolist()), reference["greedy"][:2].tolist()
    assert reference["margin"][:2].min() > 1e-3
    runner = load(mini / "mxfp4", device, Limits(2, 128, 64))
    runner.submit([Row(1, 0, prompt[:64])])
    ids = [runner.submit([Row(1, 64, prompt[64:], GREEDY, prompt)]).wait()[0].token]
    ids.append(runner.submit([Row(1, len(prompt), None, GREEDY)]).wait()[0].token)
    assert ids == wanted


@pytest.mark.parametrize("kv_bits", [None, pytest.param(8, marks=pytest.mark.slow)])
def test_a_batch_matches_plain_torch(mini, device, kv_bits):
    """Three rows of a step of four, in slots used before: one greedy and masked, one at a temperature, one through the
    whole sampler. One row joins later, and the host feeds one a token."""
    samplings = [GREEDY, Sampling(seed=5), Sampling(seed=6, top_p=0.8, frequency_penalty=0.5, logprobs=2)]
    prompts = [tuple(range(n, n + length)) for n, length in ((3, 11), (50, 4), (200, 1))]
    results = []
    for kernels in (True, False):
        runner = load(mini / "nvfp4", device, Limits(5, 64, 32, kv_bits=kv_bits), kernels)
        runner.submit([Row(slot, 0, (7, 8), GREEDY, (7, 8)) for slot in range(5)]).wait()
        slots, got = (4, 0, 2), []
        for step in range(3):
            rows = []
            for slot, prompt, sampling in zip(slots, prompts, samplings, strict=True):
                if step == 0 and slot == 2:
                    continue
                begins = step == (1 if slot == 2 else 0)
                start = 0 if begins else len(prompt) + step - (2 if slot == 2 else 1)
                tokens = prompt if begins else (9,) if (step, slot) == (2, 4) else None
                mask = b"\xff" * 8 if slot == 4 else None
                rows.append(Row(slot, start, tokens, sampling, prompt if begins else None, mask=mask))
            got.append(runner.submit(rows).wait())
        results.append(got)
        assert all(step[0].token < 64 for step in got)
    for ours, plain in zip(*results, strict=True):
        assert [s.token for s in ours] == [s.token for s in plain]
        assert np.allclose([s.logprob for s in ours], [s.logprob for s in plain], atol=5e-3 if kv_bits else 1e-4)
        assert [[i for i, _ in s.top] for s in ours] == [[i for i, _ in s.top] for s in plain]


def test_drafts_give_the_tokens_of_decoding_without_them(mini, device):
    """One step of plain torch a token, and one step of the kernels for rows with 3, 2 and no drafts, of which all, one
    and none are right, past the window: greedy, at a temperature, and through the whole sampler."""
    samplings = [GREEDY, Sampling(seed=5), Sampling(seed=6, top_p=0.8)]
    prompts, limits = [tuple(range(n, n + 9)) for n in (40, 50, 60)], Limits(3, 32, 16, drafts=3)
    plain = load(mini / "mxfp4", device, limits, kernels=False)
    begin = [Row(slot, 0, *row) for slot, row in enumerate(zip(prompts, samplings, prompts, strict=True))]
    steps, saved = [plain.submit(begin).wait()], [plain.save(slot, 0, 9) for slot in range(3)]
    for n in range(4):
        rows = [Row(slot, 9 + n, None, sampling) for slot, sampling in enumerate(samplings)]
        steps.append(plain.submit(rows).wait())
    texts = [[step[slot] for step in steps] for slot in range(3)]
    ids = [[sampled.token for sampled in text] for text in texts]
    drafts = [tuple(ids[0][1:4]), (ids[1][1], (ids[1][2] + 1) % 320), ()]
    runner, rows = load(mini / "mxfp4", device, limits), []
    for slot, given in enumerate(drafts):
        runner.restore(slot, [saved[slot]])
        rows.append(Row(slot, 9, (ids[slot][0],), samplings[slot], prompts[slot], drafts=given))
    for sampled, text, count in zip(runner.submit(rows).wait(), texts, (4, 2, 1), strict=True):
        tokens = [sampled, *sampled.accepted]
        assert [s.token for s in tokens] == [s.token for s in text[1 : 1 + count]]
        assert np.allclose([s.logprob for s in tokens], [s.logprob for s in text[1 : 1 + count]], atol=1e-4)


def test_a_step_over_a_cache_in_8_bits_matches_plain_torch(mini, device):
    """A prompt that is decoded from its codes, and a step that writes and reads them. A key on the border of two codes
    may take either, by the rounding of the products before it."""
    results = []
    for kernels in (True, False):
        runner = load(mini / "mxfp4", device, Limits(2, 16, 16, kv_bits=8), kernels)
        first = runner.submit([Row(1, 0, (3, 4, 5), GREEDY, (3, 4, 5))]).wait()
        results.append([*first, *runner.submit([Row(1, 3, (9,), GREEDY)]).wait()])
    for ours, plain in zip(*results, strict=True):
        assert ours.token == plain.token and abs(ours.logprob - plain.logprob) < 5e-3


@pytest.mark.parametrize("packed", [False, True], ids=["", "8 bits"])
def test_a_short_message_after_a_long_context(device, close, monkeypatch, packed):
    """Its few queries are rows of a decoding step over a view of the cache; the rest of the cache is NaN."""
    monkeypatch.setattr(fused, "SPLIT_KEYS", 100)
    generator = torch.Generator().manual_seed(0)
    q = torch.randn((1, 4, 3, 64), generator=generator)
    cache = torch.full((2, 3, 2, 200, 64), torch.nan)
    cache[:, 1, :, :150] = torch.randn((2, 2, 150, 64), generator=generator)
    keys, values = ((pack(part) if packed else part)[1:2, :, :150] for part in cache.to(device))
    sinks = torch.tensor([0.5, -2.0, 3.0, 0.0], device=device)
    wanted = TorchOperations(1).attend_causal(q.to(device), keys, values, sinks, 0.125)
    close(fused.Fused().attend_causal(q.to(device), keys, values, sinks, 0.125), wanted, 1e-5)


def test_activations_in_bfloat16_stay_close(mini, device):
    checkpoint, prompt = checkpoints.open(mini / "mxfp4"), range(1, 30)
    exact = load(mini / "mxfp4", device, Limits(1, 64, 64)).logits(prompt)
    limits = Limits(1, 64, 64)
    narrow = cuda.load(checkpoint, device=str(device), dtype="bfloat16", limits=limits, kernels=True).logits(prompt)
    assert np.corrcoef(exact.ravel(), narrow.ravel())[0, 1] > 0.98


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"num_experts_per_tok": 3}, "and 3; use --device cpu"),
        ({"hidden_size": 200}, r"layers.0.attention.q.weight has rows of 200 columns, .* use --device cpu"),
        ({"intermediate_size": 72}, r"layers.0.experts.down.weight has rows of 72 columns, .* use --device cpu"),
    ],
)
def test_unsupported_models_are_refused(mini, change, said):
    """Before a weight is read."""
    checkpoint = checkpoints.open(mini / "mxfp4")
    checkpoint.config = replace(checkpoint.config, **change)
    with pytest.raises(CheckpointError, match=said):
        cuda.load(checkpoint, device="cpu", dtype=None, limits=Limits(1, 8, 8), kernels=True)


def test_gate_and_up_stored_differently_are_refused(mini, monkeypatch):
    loader = import_module("mlx_gptoss.backends.cuda.load")  # the package's `load` is a function
    monkeypatch.setattr(loader, "same_storage", lambda weights: len(weights) == 1)
    with pytest.raises(CheckpointError, match="gate and up"):
        cuda.load(checkpoints.open(mini / "mxfp4"), device="cpu", dtype=None, limits=Limits(1, 8, 8), kernels=True)


@pytest.mark.cuda
def test_replaying_the_graph_matches_running_its_kernels(mini, device, monkeypatch):
    """The same tokens for one row and for five, on the GPU."""
    from mlx_gptoss.backends.cuda import decode

    if device.type != "cuda":
        pytest.skip("torch finds no GPU")

    def eager(self, rows, keys, temperatures):
        buffers = self._ready(count := decode._bucket(len(rows)))
        staged = decode.Inputs.empty(count, torch.device("cpu"))
        staged.fill(rows, keys, temperatures)
        buffers.inputs.memory.copy_(staged.memory)
        self._run(buffers, ())
        return buffers

    prompts = [tuple(range(n, n + length)) for n, length in ((3, 40), (50, 4), (200, 1), (9, 9), (30, 22))]
    results = []
    for graph in (True, False):
        if not graph:
            monkeypatch.setattr(decode.Decoder, "step", eager)
        runner = load(mini / "mxfp4", device, Limits(5, 128, 64))
        results.append(texts(runner, prompts[:1]) + texts(runner, prompts))
    assert results[0] == results[1]


@pytest.mark.cuda
def test_a_batch_on_the_gpu_matches_each_sequence_alone(mini, device):
    if device.type != "cuda":
        pytest.skip("torch finds no GPU")
    prompts = [tuple(range(n, n + n)) for n in range(1, 60, 4)]
    runner = load(mini / "mxfp4", device, Limits(len(prompts), 128, 64))
    assert texts(runner, prompts) == [texts(runner, [prompt])[0] for prompt in prompts]


def texts(runner, prompts) -> list[list[int]]:
    """20 greedy tokens for each prompt, all prompts in one batch."""
    first = runner.submit([Row(slot, 0, prompt, GREEDY, prompt) for slot, prompt in enumerate(prompts)]).wait()
    tokens = [[sampled.token] for sampled in first]
    for step in range(19):
        rows = [Row(slot, len(prompt) + step, None, GREEDY) for slot, prompt in enumerate(prompts)]
        for ids, sampled in zip(tokens, runner.submit(rows).wait(), strict=True):
            ids.append(sampled.token)
    return tokens


@pytest.mark.cuda
def test_the_sanitizer_finds_nothing(device):
    """Run the kernels' own tests under compute-sanitizer's memory and initialization checks."""
    tool = shutil.which("compute-sanitizer")
    if device.type != "cuda" or tool is None:
        pytest.skip("no GPU, or no compute-sanitizer, which comes with the CUDA toolkit")
    here = Path(__file__).parent
    for check in ("memcheck", "initcheck"):
        words = [tool, "--tool", check, "--error-exitcode", "9", sys.executable, "-m", "pytest", "-q", "-x"]
        words += [here / "test_linear.py", here / "test_moe.py", here / "test_attention.py", "-k", "bfloat16 or sort"]
        out = subprocess.run(words, capture_output=True, text=True, timeout=3600)
        assert out.returncode == 0, out.stdout[-3000:]
