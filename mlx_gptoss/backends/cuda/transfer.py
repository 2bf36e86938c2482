"""Copies from the host to the device that do not wait for the device."""

from __future__ import annotations

import torch
from torch import Tensor


def to_device(values: Tensor, device: torch.device) -> Tensor:
    """A host tensor's copy on the device; on a CPU the tensor itself.

    A copy from ordinary memory waits until the device has done everything that was submitted before. This one goes
    through page-locked memory, which torch keeps until the copy is done.
    """
    return values.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else values.to(device)
