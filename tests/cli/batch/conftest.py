"""A model, and batches in this process."""

from __future__ import annotations

import pytest
from batch_requests import question, read, request

import mlx_gptoss

pytest.importorskip("fastapi", reason="batches need the serve extra")
from mlx_gptoss.server.batch import Batch
from mlx_gptoss.server.guard import Gate
from mlx_gptoss.server.models.named import NamedModel, model_names
from mlx_gptoss.server.responses.store import ResponseStore
from mlx_gptoss.server.service import Service


@pytest.fixture(scope="module")
def model():
    with mlx_gptoss.load(slots=4, max_context=1024, backend="mlx", device="cpu") as loaded:
        yield loaded


@pytest.fixture
def run(model, tmp_path):
    """A batch of these lines, in this process; returns the entries of OUT."""

    def run(*lines, progress=lambda: None, model=model):
        (tmp_path / "in.jsonl").write_bytes(b"\n".join(lines))
        with Batch(tmp_path / "in.jsonl", tmp_path / "out.jsonl") as batch:
            batch.run(
                Service([NamedModel(model, *model_names(None))], Gate(), store=ResponseStore(max_bytes=0)), progress
            )
        return read(tmp_path / "out.jsonl")

    return run


@pytest.fixture(scope="module")
def lines():
    return [request(f"id {number}", *question(number)) for number in range(18)]
