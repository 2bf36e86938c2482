"""Models of real sizes on torch's meta device, which has shapes and no values: loaded in no time and no memory."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from unittest.mock import patch

import numpy as np
import torch
from torch import Tensor

from mlx_gptoss.backends.cuda.kernels.fused import Fused
from mlx_gptoss.backends.cuda.load import load_model
from mlx_gptoss.backends.cuda.model import GptOss
from mlx_gptoss.config import ModelConfig
from mlx_gptoss.weights.codecs import BFLOAT16
from mlx_gptoss.weights.synthetic import Synthetic

META = torch.device("meta")


class Shapes(Synthetic):
    """Synthetic weights that are all zeros, each array in the memory of one value."""

    def _array(self, key, shape, bits, draw):
        return np.broadcast_to(np.zeros((), bits if draw.table is None else draw.table.dtype), shape)

    def _vector(self, param):
        return np.broadcast_to(np.zeros((), BFLOAT16), param.shape)


@cache
def meta_model(config: ModelConfig, form: str, dtype: torch.dtype = torch.bfloat16) -> GptOss:
    """The model as the kernels run it, on torch's meta device."""
    with patch(f"{load_model.__module__}._tensor", _meta_tensor):  # copying zeros would take most of the time
        return load_model(Shapes(config, form), dtype, META, Fused())


def _meta_tensor(arrays: Sequence[np.ndarray], axis: int, device: torch.device) -> Tensor:
    """As load._tensor, but without reading the arrays."""
    dtype = arrays[0].dtype
    kind = torch.bfloat16 if dtype.name == "bfloat16" else torch.from_numpy(np.empty(0, dtype)).dtype
    return torch.cat([torch.empty(array.shape, dtype=kind, device=device) for array in arrays], dim=axis)
