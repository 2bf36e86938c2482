"""What computes the large products of a calibration: a backend's GPU where there is one, else numpy."""

from __future__ import annotations

from ..backends import find_backend
from ..backends.base import NUMPY_PRODUCTS, Products
from ..errors import BackendUnavailable


def find_products(backend: str = "auto", device: str | None = None) -> Products:
    """backend, device: as in LoadOptions. On a CPU numpy computes, whatever the backend.

    Raises InvalidRequest for an unknown backend or device; BackendUnavailable for one that is named and not installed,
    or without the device.
    """
    try:
        module, name = find_backend(backend)
    except BackendUnavailable:
        if backend == "auto" and device in (None, "cpu"):  # numpy is all that converting needs
            return NUMPY_PRODUCTS
        raise
    where = module.device_name(device)
    if where == "cpu":
        return NUMPY_PRODUCTS
    return Products(f"{name} on {where}", module.matmul(device), on_device=True)
