"""Products of numpy arrays on a torch device, for calibration."""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray

from ..base import MatMul

Floats = NDArray[np.float32]


def matmul_on(device: torch.device) -> MatMul:
    """As Backend.matmul. torch multiplies float32 in full precision unless the process has asked for less."""

    def matmul(a: Floats, b: Floats) -> Floats:
        with torch.inference_mode():
            product = _tensor(a, device) @ _tensor(b, device)
            return np.asarray(product.cpu().numpy())

    return matmul


def _tensor(a: Floats, device: torch.device) -> torch.Tensor:
    """The array on the device; on a CPU a view of it, unless it is read-only, which torch does not know."""
    return torch.from_numpy(a if a.flags.writeable else a.copy()).to(device)
