"""`convert --adapter` writes bfloat16 weights with the adapter inside, and says why not into other formats."""

from __future__ import annotations

import numpy as np
import pytest

import mlx_gptoss
from mlx_gptoss.errors import InvalidRequest
from mlx_gptoss.weights import checkpoint as checkpoints
from mlx_gptoss.weights import codecs
from mlx_gptoss.weights.adapters import open_adapter


@pytest.mark.parametrize("case", ["attention", "experts", "both"])
def test_merged_weights(tiny, made_by_peft, tmp_path, case):
    folder, _ = made_by_peft(case)
    report = mlx_gptoss.convert(tiny, tmp_path / "merged", to="bf16", adapter=folder)
    assert report.format == "bf16"
    source, merged = checkpoints.open(tiny), checkpoints.open(tmp_path / "merged")
    adapter, changed = open_adapter(folder, source.config), 0
    for param in source.params:
        expected = codecs.dequantize(source.read(param.name))
        delta = adapter.delta(param.name.removesuffix(".weight")) if param.is_matrix else None
        if delta is not None:
            changed += 1
            expected = expected + delta
        found = codecs.dequantize(merged.read(param.name))
        assert np.allclose(found, expected, rtol=2**-8, atol=1e-6), param.name  # rounded to bfloat16 once
    assert changed == len(adapter.entries) > 0


def test_only_into_bf16(tiny, made_by_peft, tmp_path):
    folder, _ = made_by_peft("attention")
    with pytest.raises(InvalidRequest, match=r"merged into bf16 alone, not mlx-4bit"):
        mlx_gptoss.convert(tiny, tmp_path / "merged", to="mlx-4bit", adapter=folder)
    assert not (tmp_path / "merged").exists()
