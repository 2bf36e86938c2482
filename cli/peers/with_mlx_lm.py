"""mlx-lm as a peer. Prefill and decode go as in its own generate_step: chunks of 2048, the prompt's last token alone,
and the next step started before a token is read."""

from __future__ import annotations

from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
from mlx_lm.models.cache import make_prompt_cache
from mlx_lm.utils import load_model
from numpy.typing import NDArray

from .serve import serve

CHUNK = 2048


class MlxLm:
    version = version("mlx-lm")
    backend = "mlx"

    def __init__(self, folder: Path, device: str, dtype: str | None) -> None:
        if device == "cpu":
            mx.set_default_device(mx.cpu)
        self._model, config = load_model(folder)
        if dtype is not None:
            self._model.set_dtype(getattr(mx, dtype))
        mx.eval(self._model.parameters())
        self.vocab = int(config["vocab_size"])
        self.device = "cpu" if mx.default_device().type == mx.cpu else "gpu"
        self.dtype = str(self._model.model.norm.weight.dtype).removeprefix("mlx.core.")
        self.start()

    def start(self) -> None:
        self._cache: list[Any] = make_prompt_cache(self._model)
        self._token: Any = None

    def feed(self, ids: Sequence[Sequence[int]]) -> None:
        tokens = mx.array([list(row) for row in ids])
        while tokens.shape[1] > 1:
            some = min(CHUNK, tokens.shape[1] - 1)
            self._model(tokens[:, :some], cache=self._cache)
            mx.eval([layer.state for layer in self._cache])
            tokens = tokens[:, some:]
            mx.clear_cache()
        self._token = self._next(tokens)
        mx.eval(self._token)

    def decode(self, steps: int) -> None:
        token = self._token
        for _ in range(steps):
            ahead = self._next(token)
            mx.async_eval(ahead)  # type: ignore[no-untyped-call]
            token.tolist()
            token = ahead
        mx.eval(token)
        self._token = token

    def logits(self, ids: Sequence[int]) -> NDArray[np.float32]:
        return np.array(self._model(mx.array([list(ids)]))[0].astype(mx.float32))

    def peak_memory(self) -> int:
        return int(mx.get_peak_memory())

    def _next(self, tokens: Any) -> Any:
        """[B, L] -> the greedy choice after the last, [B, 1]"""
        return mx.argmax(self._model(tokens, cache=self._cache)[:, -1:], axis=-1)


if __name__ == "__main__":
    serve(MlxLm)
