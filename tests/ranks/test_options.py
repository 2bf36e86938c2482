"""What load() can be asked for works over two ranks as it does on one: the same tokens, the same numbers."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from answer import ENDLESS, PROMPT

import mlx_gptoss

SCRIPT = str(Path(__file__).parent / "answer.py")
OPTIONS = {"path_or_repo_id": None, "backend": "mlx", "max_context": 1024}


def over_two(start, **options):
    (code, out, err), (other, said, more) = start(2, SCRIPT, json.dumps(OPTIONS | options)).end(60)
    assert (code, other, said) == (0, 0, ""), err + more
    return json.loads(out)


def alone(**options):
    with mlx_gptoss.load(**OPTIONS | options) as model:
        *_, finished = model.stream_raw(PROMPT, sampling=ENDLESS, max_tokens=24)
    return finished


def assert_same(split, whole):
    assert split["ids"] == [token.id for token in whole.tokens]
    assert split["logprobs"] == pytest.approx([token.logprob for token in whole.tokens], abs=1e-4)


@pytest.mark.parametrize("options", [{"kv_bits": 8}, {"speculate": True}, {"quantize": "mlx-4bit"}], ids=str)
def test_options(ring, options):
    split, whole = over_two(ring, **options), alone(**options)
    assert_same(split, whole)
    assert (split["drafted"], split["accepted"]) == (whole.drafted, whole.accepted)
    assert (whole.drafted > 0) == ("speculate" in options)


@pytest.mark.parametrize("backend", ["mlx", pytest.param("cuda", marks=pytest.mark.slow)])
def test_prompts_are_kept_in_files(ring, torchrun, tmp_path, backend):
    """Another launch goes on from them; one process, or a launch of other options, does not."""
    start = ring if backend == "mlx" else torchrun
    options = {"backend": backend, "device": "cpu", "prefix_cache": 1 << 30, "prompt_cache": str(tmp_path)}
    first, second = (over_two(start, **options) for _ in range(2))
    assert (first.pop("cached_tokens"), second.pop("cached_tokens")) == (0, 256)
    assert first == second
    whole = alone(**options)
    assert whole.usage.cached_tokens == 0
    assert_same(first, whole)


def test_a_rank_whose_memory_is_short(ring):
    """Then all ranks look embeddings up in the file."""
    split = over_two(ring, short=True)
    assert split["mapped"] > 0
    assert_same(split, alone())
