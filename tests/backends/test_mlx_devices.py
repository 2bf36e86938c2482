"""The MLX backend's errors for devices and dtypes that do not exist."""

from __future__ import annotations

import mlx.core as mx
import pytest

from mlx_gptoss.backends import mlx as backend
from mlx_gptoss.errors import BackendUnavailable, InvalidRequest


def test_devices_and_dtypes_that_do_not_exist():
    with pytest.raises(InvalidRequest, match="device must be"):
        backend.pick_device("tpu")
    with pytest.raises(InvalidRequest, match="dtype must be"):
        backend.dtype_name("cpu", "int8")
    if not mx.is_available(mx.Device(mx.gpu)):
        with pytest.raises(BackendUnavailable, match="no GPU"):
            backend.pick_device("gpu")
