"""Adapters through the engine: prompts of different adapters share no prefix, in memory and in files; drafts, an 8-bit
cache and the memory plan."""

from __future__ import annotations

import shutil
from dataclasses import replace

import pytest
from tiny_peft import rewrite

import mlx_gptoss
from mlx_gptoss.backends import BACKENDS
from mlx_gptoss.errors import InvalidRequest
from mlx_gptoss.loading.plan import LoadRequest, open_source, plan_load

PROMPT = [7 + n % 80 for n in range(300)]


def load(tiny, made_by_peft, *cases, backend="mlx", **options):
    adapters = {case: made_by_peft(case)[0] for case in cases}
    return mlx_gptoss.load(tiny, backend=backend, device="cpu", dtype="float32", adapters=adapters, **options)


def run(model, adapter):
    done = model.complete(PROMPT, max_tokens=6, adapter=adapter, temperature=0)
    return done.ids, done.usage.cached_tokens


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("options", [{}, {"speculate": True}, {"kv_bits": 8}], ids=str)
def test_prompts_of_different_adapters_share_no_prefix(tiny, made_by_peft, backend_module, backend, options):
    backend_module(backend)
    with load(tiny, made_by_peft, "both", "experts", backend=backend, prefix_cache=1 << 28, **options) as model:
        first = {name: run(model, name) for name in (None, "both", "experts")}
        again = {name: run(model, name) for name in ("experts", None, "both")}
    assert all(cached == 0 for _, cached in first.values())
    assert all(cached >= 256 for _, cached in again.values())
    assert {name: ids for name, (ids, _) in again.items()} == {name: ids for name, (ids, _) in first.items()}
    assert len({tuple(ids) for ids, _ in first.values()}) == 3


def test_files_of_prompts_are_the_adapter_s(tiny, made_by_peft, tmp_path):
    """By its content: under another name, after another adapter, but not with another scale."""
    files = {"prompt_cache": tmp_path / "cache", "prefix_cache": 1 << 28}
    with load(tiny, made_by_peft, "both", **files) as model:
        (expected, _), (base, _) = run(model, "both"), run(model, None)
    with load(tiny, made_by_peft, "experts", "both", **files) as model:
        (ids, cached), (_, other) = run(model, "both"), run(model, "experts")
        assert (ids, other) == (expected, 0) and cached >= 256
        assert run(model, None)[1] >= 256
    changed = shutil.copytree(made_by_peft("both")[0], tmp_path / "changed")
    rewrite(changed, lora_alpha=7)
    options = {"backend": "mlx", "device": "cpu", "dtype": "float32"}
    with mlx_gptoss.load(tiny, adapters={"both": changed}, **options, **files) as model:
        assert run(model, "both")[1] == 0
    with mlx_gptoss.load(tiny, **options, **files) as model:  # without any: the files of the others stay
        ids, cached = run(model, None)
        assert ids == base and cached >= 256
    with load(tiny, made_by_peft, "both", **files) as model:
        assert run(model, "both")[1] >= 256


def test_the_memory_plan_counts_the_factors(tiny, made_by_peft):
    request = LoadRequest(model=str(tiny), backend="mlx", device="cpu", dtype="float32", max_context=128)
    plain = plan_load(request, open_source(request)).memory
    request = replace(request, adapters={"a": str(made_by_peft("both")[0])})
    plan = plan_load(request, open_source(request))
    factors = [plan.adapters["a"].stacked([name]) for name in plan.adapters["a"].entries]
    least = sum(each.a.nbytes + each.b.nbytes for each in factors) // 2
    assert plan.memory.needed_bytes - plain.needed_bytes == plan.memory.adapter_bytes >= least


def test_names_that_are_refused(tiny, made_by_peft):
    with load(tiny, made_by_peft, "both") as model, pytest.raises(InvalidRequest, match="'nobody' is not loaded"):
        model.complete(PROMPT, adapter="nobody")
    with pytest.raises(InvalidRequest, match="letters"):
        mlx_gptoss.load(tiny, adapters={"a:b": "x"})
