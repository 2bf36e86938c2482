"""transformers as a peer. MXFP4 is decoded to the activations' dtype when it loads, for its kernels come from the hub;
attention and experts are computed as it chooses itself. Prefill in chunks of 2048; greedy choices stay on the
device."""

from __future__ import annotations

import json
import resource
import sys
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from transformers import DynamicCache, GptOssForCausalLM, Mxfp4Config

from .serve import serve

CHUNK = 2048


class Transformers:
    version = version("transformers")
    backend = "torch"

    def __init__(self, folder: Path, device: str, dtype: str | None) -> None:
        torch.set_grad_enabled(False)
        self._where = torch.device("cpu" if device == "cpu" else "cuda")
        self.device = "cpu" if device == "cpu" else torch.cuda.get_device_name(self._where)
        self.dtype = dtype or ("float32" if device == "cpu" else "bfloat16")
        stored = json.loads((folder / "config.json").read_text()).get("quantization_config", {})
        decoded = {"quantization_config": Mxfp4Config(dequantize=True)} if stored.get("quant_method") == "mxfp4" else {}
        model: Any = GptOssForCausalLM.from_pretrained(folder, dtype=getattr(torch, self.dtype), **decoded)
        self._model = model.to(self._where).eval()
        self.vocab = int(model.config.vocab_size)
        self.start()

    def start(self) -> None:
        self._cache = DynamicCache(config=self._model.config)
        self._token: Any = None

    def feed(self, ids: Sequence[Sequence[int]]) -> None:
        tokens = torch.tensor(ids, device=self._where)
        for piece in torch.split(tokens, CHUNK, dim=1):
            self._token = self._next(piece)
        self._wait()

    def decode(self, steps: int) -> None:
        for _ in range(steps):
            self._token = self._next(self._token)
        self._wait()

    def logits(self, ids: Sequence[int]) -> NDArray[np.float32]:
        out = self._model(torch.tensor([list(ids)], device=self._where))
        found: NDArray[np.float32] = out.logits[0].float().cpu().numpy()
        return found

    def peak_memory(self) -> int:
        if self._where.type == "cuda":
            return torch.cuda.max_memory_allocated(self._where)
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)

    def _next(self, tokens: Any) -> Any:
        """[B, L] -> the greedy choice after the last, [B, 1]"""
        out = self._model(tokens, past_key_values=self._cache, use_cache=True, logits_to_keep=1)
        return out.logits.argmax(dim=-1)

    def _wait(self) -> None:
        if self._where.type == "cuda":
            torch.cuda.synchronize(self._where)


if __name__ == "__main__":
    serve(Transformers)
