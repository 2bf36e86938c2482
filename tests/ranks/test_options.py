"""The options of load() work on two ranks as on one: the same tokens and the same numbers."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import family
import pytest
from answer import ENDLESS, PROMPT

import mlx_gptoss
from mlx_gptoss.ranks.runner import PART_LENGTH, _split_parts

SCRIPT = str(Path(__file__).parent / "answer.py")
OPTIONS = {"path_or_repo_id": None, "backend": "mlx", "max_context": 1024}


def run_on_two_ranks(start, **options):
    (code, out, err), (other_code, other_out, other_err) = start(2, SCRIPT, json.dumps(OPTIONS | options)).end(60)
    assert (code, other_code, other_out) == (0, 0, ""), err + other_err
    return json.loads(out)


def run_alone(**options):
    with mlx_gptoss.load(**OPTIONS | options) as model:
        *_, finished = model.stream_raw(PROMPT, sampling=ENDLESS, max_tokens=24)
    return finished


def assert_same(split, whole, within=1e-4):
    assert split["ids"] == [token.id for token in whole.tokens]
    assert split["logprobs"] == pytest.approx([token.logprob for token in whole.tokens], abs=within)


@pytest.mark.parametrize("backend", ["mlx", pytest.param("cuda", marks=pytest.mark.slow)])
@pytest.mark.parametrize("options", [{"kv_bits": 8}, {"speculate": True}, {"quantize": "mlx-4bit"}], ids=str)
def test_options(ring, torchrun, backend, options):
    start, options = ring if backend == "mlx" else torchrun, {**options, "backend": backend, "device": "cpu"}
    split, whole = run_on_two_ranks(start, **options), run_alone(**options)
    # Sums in another order round otherwise, and a key on the border of two 8-bit steps then takes the other one.
    assert_same(split, whole, 5e-3 if "kv_bits" in options else 1e-4)
    assert (split["drafted"], split["accepted"]) == (whole.drafted, whole.accepted)
    assert (whole.drafted > 0) == ("speculate" in options)


@pytest.mark.parametrize("backend", ["mlx", pytest.param("cuda", marks=pytest.mark.slow)])
def test_layers_that_differ(ring, torchrun, tmp_path, backend):
    """Each rank holds its part of each layer's experts, whose numbers differ."""
    experts, windows = [8, 3, 5], [8, None, 24]
    config = family.CONFIG | {"num_hidden_layers": 3, "num_local_experts": experts, "sliding_window": windows}
    tensors = family.random_tensors(experts, vocab=342)  # the prompt's ids, and those that ENDLESS holds back
    folder = family.write_checkpoint(tmp_path / "model", config | {"vocab_size": 342}, tensors)
    options = {"path_or_repo_id": str(folder), "backend": backend, "device": "cpu"}
    split, whole = run_on_two_ranks(ring if backend == "mlx" else torchrun, **options), run_alone(**options)
    assert_same(split, whole)


@pytest.mark.parametrize("backend", ["mlx", pytest.param("cuda", marks=pytest.mark.slow)])
def test_the_prompt_cache_survives_the_launch(ring, torchrun, tmp_path, backend):
    """A second launch reads its files; a single process does not."""
    start = ring if backend == "mlx" else torchrun
    options = {"backend": backend, "device": "cpu", "prefix_cache": 1 << 30, "prompt_cache": str(tmp_path)}
    first, second = (run_on_two_ranks(start, **options) for _ in range(2))
    assert (first.pop("cached_tokens"), second.pop("cached_tokens")) == (0, 256)
    assert_equal_runs(first, second)
    whole = run_alone(**options)
    assert whole.usage.cached_tokens == 0
    assert_same(first, whole)


def assert_equal_runs(first, second):
    """But for the rounding of chunks that begin elsewhere: how sums are ordered depends on the number of tokens."""
    assert first | {"logprobs": None} == second | {"logprobs": None}
    assert first["logprobs"] == pytest.approx(second["logprobs"], rel=0, abs=1e-4)


def shorten_last_part(parts):
    return [*parts[:-1], parts[-1][:-64]]


def leave_out_last_part(parts):
    return parts[:-1]


@pytest.mark.parametrize("damage", [shorten_last_part, leave_out_last_part])
def test_a_damaged_prompt_cache_is_computed_again(ring, tmp_path, damage):
    """The digest matches, and rank 0's part is whole. Both ranks go on, and the next launch finds new files."""
    options = {"prefix_cache": 1 << 30, "prompt_cache": str(tmp_path)}
    first = run_on_two_ranks(ring, **options)
    for path in tmp_path.rglob("*.kv"):
        line, _, data = path.read_bytes().partition(b"\n")
        data = b"".join(PART_LENGTH.pack(len(part)) + part for part in damage(_split_parts(data, 2)))
        header = {**json.loads(line), "bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}
        path.write_bytes(json.dumps(header).encode() + b"\n" + data)
    second, third = (run_on_two_ranks(ring, **options) for _ in range(2))
    assert [run.pop("cached_tokens") for run in (first, second, third)] == [0, 0, 256]
    assert first == second
    assert_equal_runs(second, third)


def test_a_rank_short_of_memory(ring):
    """All ranks then read the embeddings from the mapped file."""
    split = run_on_two_ranks(ring, short=True)
    assert split["mapped"] > 0
    assert_same(split, run_alone())
