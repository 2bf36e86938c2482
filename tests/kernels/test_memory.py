"""GPU memory of gpt-oss-20b with 8k of context, summed on torch's meta device, which has shapes and no values."""

from __future__ import annotations

import weakref
from collections import Counter
from dataclasses import replace

import pytest
import torch
from shapes import META, Shapes, meta_model
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from mlx_gptoss.backends import cuda
from mlx_gptoss.backends.cuda.cache import Cache, Span
from mlx_gptoss.backends.cuda.decode import Decoder
from mlx_gptoss.backends.cuda.kernels.fused import Fused
from mlx_gptoss.config import PRESETS
from mlx_gptoss.loading.recommend import padding_bytes
from mlx_gptoss.weights.params import MATRIX_ROLES
from mlx_gptoss.weights.synthetic import Synthetic

CONTEXT = 8192


class Live(TorchDispatchMode):
    """Counts the bytes of live tensor storages, now and at their peak."""

    def __init__(self) -> None:
        super().__init__()
        self.tensors: Counter[int] = Counter()
        self.bytes = self.peak = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        made = function(*args, **(kwargs or {}))
        before = {
            leaf.untyped_storage()._cdata for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, torch.Tensor)
        }
        for leaf in tree_leaves(made):
            if isinstance(leaf, torch.Tensor):
                self._hold(leaf, known=leaf.untyped_storage()._cdata in before)
        return made

    def _hold(self, tensor: torch.Tensor, known: bool) -> None:
        place, size = tensor.untyped_storage()._cdata, tensor.untyped_storage().nbytes()
        if known and not self.tensors[place]:
            return  # a view of a tensor that was made before this mode was entered
        if not self.tensors[place]:
            self.bytes += size
            self.peak = max(self.peak, self.bytes)
        self.tensors[place] += 1
        weakref.finalize(tensor, self._drop, place, size)

    def _drop(self, place: int, size: int) -> None:
        self.tensors[place] -= 1
        if not self.tensors[place]:
            self.bytes -= size


@pytest.mark.parametrize("form", ["mxfp4", "nvfp4", "mlx-4bit", "mlx-8bit"])
def test_the_plan_counts_the_padding_of_scales(form):
    """Bytes of all matrices as loaded for the kernels: those stored, and the padding, which a CPU does not have."""
    config = replace(PRESETS["20b"], num_hidden_layers=1, layer_types=PRESETS["20b"].layer_types[:1], vocab_size=1024)
    source = Shapes(replace(config, num_local_experts=4), form)
    model = meta_model(source.config, form)
    (block,) = model.blocks
    layers = block.attention.qkv, block.attention.out, block.mlp.router, block.mlp.experts.gate_up
    matrices = [m for layer in (*layers, block.mlp.experts.down, model.lm_head) for m in layer.matrices]
    parts = [t for m in (*matrices, model.embed) for t in vars(m).values() if isinstance(t, torch.Tensor)]
    padding = padding_bytes(source, "cuda", "a GPU")
    stored = sum(map(source.matrix_bytes, MATRIX_ROLES))
    assert sum(part.nbytes for part in parts) == pytest.approx(stored + padding, abs=100)  # but for NVFP4's factors
    assert padding > 100 and padding_bytes(source, "cuda", "cpu") == padding_bytes(source, "mlx", "a GPU") == 0


@pytest.mark.parametrize(("kv_bits", "bounds", "kernels"), [(None, (13.9e9, 14.5e9), 160), (8, (13.8e9, 14.4e9), 172)])
@torch.inference_mode()
def test_mxfp4_takes_at_most_14_5_gb_with_8k_of_context(no_kernels, kv_bits, bounds, kernels):
    config = PRESETS["20b"]
    chunk = cuda.GPU_CHUNK
    few = replace(config, num_hidden_layers=2, layer_types=config.layer_types[:2], vocab_size=1024)
    model = meta_model(few, "mxfp4")
    with Live() as prefill:
        pack = Fused().pack if kv_bits else None
        cache = Cache(few, 1, CONTEXT, torch.bfloat16, META, whole=True, pack=pack)
        held = prefill.bytes
        ids = torch.zeros((1, chunk), dtype=torch.int64, device=META)
        model(ids, cache, Span.of([0], [CONTEXT - chunk], chunk, META))
    token = torch.bfloat16.itemsize * 2 * config.kv_size  # bytes of keys and values in one layer
    stored = token if kv_bits is None else 2 * config.kv_size // 64 * 72
    assert held == stored * CONTEXT + token * config.sliding_window
    with Live() as decode:
        last = torch.zeros(1, dtype=torch.int64, device=META)
        decoder = Decoder(replace(model, config=config), cache, last, CONTEXT)
        decoder.prepare(1)
    kv = stored * CONTEXT * config.full_layers + token * config.sliding_window * config.sliding_layers
    source = Synthetic(config, "mxfp4")
    weights = source.size_bytes + padding_bytes(source, "cuda", "a GPU")
    total = weights + kv + (prefill.peak - held) + decode.peak
    print(f"weights {weights}, cache {kv}, prefill {prefill.peak - held}, decoding {decode.peak}: {total}")
    assert bounds[0] < total < bounds[1]
    no_kernels.clear()
    decoder._run(decoder._ready(1), ())
    once = 4  # kernels outside the layers: embedding, lm_head, and two to draw
    assert (len(no_kernels) - once) * config.num_hidden_layers // 2 + once == kernels  # a token, as the README says
