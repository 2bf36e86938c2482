"""The memory plan: its arithmetic for the published models, and an error with numbers and advice if nothing fits."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from mlx_gptoss.backends import find_backend
from mlx_gptoss.config import GPT_OSS_20B, GPT_OSS_120B
from mlx_gptoss.errors import DoesNotFit
from mlx_gptoss.loading.memory import plan_memory, require_fit, wired_limit
from mlx_gptoss.loading.plan import memory_plan, open_checkpoint
from mlx_gptoss.machine import system_available
from mlx_gptoss.weights.formats import WRITERS
from mlx_gptoss.weights.params import parameters
from mlx_gptoss.weights.tensor import Quantized

GB, GIB = 10**9, 1 << 30


def plan(available, *, config=GPT_OSS_20B, weights=13_800_000_000, context=None, slots=1, prefix=0):
    options = {"context": context, "slots": slots, "prefix_bytes": prefix}
    return plan_memory(config, weights, available, activation_bytes=2, **options)


def sizes_of(config, name):
    """Bytes of each part of a model in a format."""
    params = parameters(config)
    units = WRITERS[name].units(name, params, {param.name: "BF16" for param in params})
    return {unit.params[0].name: sum(info.nbytes for info in unit.tensors) for unit in units}


def test_kv_bytes_of_the_published_models():
    twenty, hundred = plan(100 * GB), plan(100 * GB, config=GPT_OSS_120B)
    assert (twenty.kv_bytes_per_token, twenty.ring_bytes) == (24576, 24576 * 128)
    assert hundred.kv_bytes_per_token == 36864


def test_131k_context_of_20b_fits_in_its_budget():
    full = plan(100 * GB)
    assert full.context == 131072
    assert full.needed_bytes <= full.weights_bytes + 3.3 * GB + 1 * GB


def test_a_cache_in_8_bits_takes_9_sixteenths_of_one_in_bfloat16():
    packed = plan_memory(GPT_OSS_20B, 0, 100 * GB, activation_bytes=2, kv_bits=8)
    assert packed.kv_bytes_per_token * 16 == plan(100 * GB).kv_bytes_per_token * 9
    assert packed.ring_bytes == plan(100 * GB).ring_bytes


def test_drafts_are_more_positions_in_each_ring_and_more_logits():
    plain, drafting = (plan_memory(GPT_OSS_20B, 0, 100 * GB, activation_bytes=2, drafts=drafts) for drafts in (0, 3))
    assert drafting.ring_bytes - plain.ring_bytes == 12 * 3 * 2 * GPT_OSS_20B.kv_size * 2
    assert drafting.step_bytes - plain.step_bytes == 3 * 4 * GPT_OSS_20B.vocab_size * 4


def test_the_default_context_shrinks_to_what_fits():
    tight = plan(16 * GB)
    assert tight.fits and 2048 <= tight.context < 131072
    assert tight.context % 256 == 0
    assert not replace(tight, context=tight.context + 256).fits


def test_the_prefill_chunk_is_as_large_as_memory_allows():
    roomy, asked, tight = plan(100 * GB), plan(17.72 * GB, context=131072), plan(14.5 * GB)
    assert (roomy.chunk, asked.chunk, tight.chunk) == (2048, 512, 256)
    assert asked.fits and asked.needed_bytes + roomy.working_bytes - asked.working_bytes > asked.available_bytes
    assert plan(16 * GB).chunk == 2048  # a long default context is reduced before the chunk


@pytest.mark.parametrize(
    ("budget", "kv_bits", "context"),
    [(16 * GIB * 2 // 3, None, 8960), (16 * GIB * 2 // 3, 8, 15104), (11 * GB, None, None)],
)
def test_20b_on_a_mac_of_16_gb(budget, kv_bits, context):
    """mlx-mxfp4-q4 fits in two thirds of the memory, Metal's recommended working set, if the embeddings and the unused
    rows of lm_head stay in the mapped file. With less available, one command raises the limit enough."""
    sizes = sizes_of(GPT_OSS_20B, "mlx-mxfp4-q4")
    unused = GPT_OSS_20B.vocab_size - 200019
    left = sizes["embed.weight"] + sizes["lm_head.weight"] * unused // GPT_OSS_20B.vocab_size
    mac = plan_memory(
        GPT_OSS_20B, sum(sizes.values()), budget, activation_bytes=2, kv_bits=kv_bits, mappable_bytes=left
    )
    if context:
        assert mac.fits and mac.context == context and mac.mapped_bytes == left
        assert not replace(mac, mapped_bytes=0).fits
    else:
        assert not mac.fits and wired_limit(mac, 16 * GIB) == "sudo sysctl iogpu.wired_limit_mb=11264"
        assert replace(mac, available_bytes=11264 << 20).fits


def test_a_raised_limit_is_not_advised_where_it_would_not_help():
    tight = plan(16 * GB, context=131072)
    assert wired_limit(tight, 24 * GIB) is not None
    assert wired_limit(tight, 19 * GIB) is None  # macOS needs the rest
    assert wired_limit(tight, 17 * GIB) is None  # a CPU: only the memory limits the plan
    assert wired_limit(plan(100 * GB), 128 * GIB) is None  # it fits
    assert wired_limit(tight, 0) is None  # not a Mac


def test_the_prefix_cache_takes_only_what_is_left():
    """Beside it, a chunk of 20b keeps keys and values of 2048 tokens and a window in 12 sliding layers, 53 MB."""
    inside = 12 * (2048 + 128) * 2048
    roomy, without = plan(100 * GB, prefix=None), plan(100 * GB)
    assert roomy.step_bytes - without.step_bytes == inside and roomy.prefix_bytes == 2 << 30
    just = plan(without.needed_bytes + inside, prefix=None)
    assert just.fits and (just.prefix_bytes, just.needed_bytes) == (0, without.needed_bytes)
    little = plan(without.needed_bytes + inside + 1000, prefix=None)
    assert little.fits and little.prefix_bytes == 500
    asked = plan(100 * GB, prefix=1000, slots=3)
    assert asked.step_bytes - plan(100 * GB, slots=3).step_bytes == 12 * (2048 + 3 * 128) * 2048


def test_mappable_weights_are_loaded_if_they_fit():
    roomy = plan_memory(GPT_OSS_20B, 13 * GB, 100 * GB, activation_bytes=2, mappable_bytes=GB)
    assert roomy.mapped_bytes == 0


def test_dense_matrices_are_upcast_if_that_fits_as_well():
    def plan_upcast(available, context=None):
        room = {"activation_bytes": 4, "context": context, "mappable_bytes": GB, "upcastable_bytes": 2 * GB}
        return plan_memory(GPT_OSS_20B, 13 * GB, available, **room)

    kept = plan_upcast(16 * GB, 8192)
    assert kept.fits and kept.upcast_bytes == 0
    roomy = plan_upcast(kept.needed_bytes + 2 * GB, 8192)
    assert roomy.fits and roomy.upcast_bytes == 2 * GB and roomy.needed_bytes == kept.needed_bytes + 2 * GB
    assert plan_upcast(30 * GB).context == plan_upcast(28 * GB).context == 131072  # the context has priority
    assert plan_upcast(11 * GB, 2048).upcast_bytes == 0


def test_an_explicit_context_is_never_reduced():
    asked = plan(16 * GB, context=131072)
    assert asked.context == 131072 and not asked.fits
    with pytest.raises(DoesNotFit, match=rf"--max-context {asked.largest_context}"):
        require_fit(asked, "20b", {})


def test_a_refusal_names_a_format_that_fits():
    with pytest.raises(DoesNotFit, match=r"needs 14\..* GB .*13\.8 GB.* and 12\.5 GB are available.*--to mlx-4bit"):
        require_fit(plan(12_500_000_000), "20b", {"mlx-4bit": 11_000_000_000, "mlx-8bit": 22_000_000_000})


def test_if_no_format_fits_the_error_gives_the_memory_needed():
    with pytest.raises(DoesNotFit, match=r"at least 11\.0 GB"):
        require_fit(plan(4 * GB), "20b", {"mlx-4bit": 11_000_000_000})


def test_slots_multiply_the_cache():
    one, four = plan(100 * GB, context=4096), plan(100 * GB, context=4096, slots=4)
    cache = one.context * one.kv_bytes_per_token + one.ring_bytes
    logits = 3 * 4 * GPT_OSS_20B.vocab_size * 4
    growing = 3 * one.context * one.layer_bytes_per_token
    assert four.needed_bytes - one.needed_bytes == 3 * cache + logits + growing


def test_available_memory_is_plausible():
    import psutil

    assert 0 < system_available() <= psutil.virtual_memory().total


@pytest.mark.parametrize(
    "name", ["mxfp4", "fp8-dynamic", "int4-autoround", "mlx-4bit", "nvfp4", "gguf/model-q8_0.gguf"]
)
def test_the_plan_counts_derived_biases(mini, name):
    """Biases that are not in the file but computed while loading, and what float32 takes more than float16 scales; the
    biases of such experts are float32 as well."""
    checkpoint = open_checkpoint(mini / name)
    plan = memory_plan(checkpoint, find_backend("mlx")[0], device="cpu", dtype="bfloat16", max_context=64)
    weights = {param: checkpoint.read(param.name) for param in checkpoint.params}
    size = sum(weight.nbytes for weight in weights.values())
    scaled = {p: w for p, w in weights.items() if isinstance(w, Quantized) and w.spec.scale == "float"}
    wide = {param: weight for param, weight in scaled.items() if weight.scale.dtype == np.float16}
    size += sum(weight.scale.nbytes + weight.bias.nbytes for weight in wide.values())
    if any(param.role == "experts" for param in wide):
        size += sum(2 * param.size for param in weights if param.role == "experts" and not param.is_matrix)
    assert (name in ("int4-autoround", "gguf/model-q8_0.gguf")) == bool(wide)
    assert plan.weights_bytes == pytest.approx(size, rel=1e-4)
    has_derived = name in ("int4-autoround", "gguf/model-q8_0.gguf")
    assert (plan.weights_bytes > checkpoint.size_bytes * 1.005) == has_derived
