"""Which gpt-oss model and format fits which Mac, by the memory plan, as Markdown.

    python mac_table.py [--kv-bits 8] [--all]

Prints one row per Mac: the largest model that fits, in the first of FORMATS that leaves room for PREFERRED_CONTEXT
tokens, or else in the last one that fits at all. The context is the longest that one request can have. --all prints
every model and format that fits.

Nothing is downloaded or measured. Weights are counted from each format's layout; everything else comes from
`plan_memory`, with the arguments that loading on a Mac's GPU uses.
"""

import argparse
from collections.abc import Iterator

from mlx_gptoss.config import GPT_OSS_20B, GPT_OSS_120B, ModelConfig
from mlx_gptoss.loading.memory import PREFERRED_CONTEXT, MemoryPlan, gigabytes, plan_memory
from mlx_gptoss.weights.formats import WRITERS
from mlx_gptoss.weights.params import parameters

MODELS = {"gpt-oss-120b": GPT_OSS_120B, "gpt-oss-20b": GPT_OSS_20B}  # the largest first
FORMATS = ["mxfp4", "mlx-mxfp4-q8", "mlx-mxfp4-q4"]  # as published, then the experts unchanged and the rest smaller
TOKENIZER_SIZE = 200_019  # lm_head's rows beyond it belong to no token
# Bytes that Metal recommends to the GPU by default, by GB of RAM: macOS 15 and older, then macOS 26. llama.cpp's log
# prints them as "recommendedMaxWorkingSetSize", in decimal MB. For 96 GB on macOS 26 no log was found.
WORKING_SETS = {
    16: (11_453_250_000, 12_713_120_000),
    24: (17_179_890_000, 19_069_670_000),
    32: (22_906_500_000, 26_800_600_000),
    64: (51_539_610_000, 55_662_790_000),
    96: (77_309_410_000, 77_309_410_000),
    128: (103_079_220_000, 115_448_730_000),
}


def plan(config: ModelConfig, name: str, available: int, kv_bits: int | None) -> MemoryPlan:
    """Return the memory plan of a model in the format `name` on a Mac whose GPU may take `available` bytes."""
    params = parameters(config)
    units = WRITERS[name].units(name, params, {param.name: "BF16" for param in params})
    sizes = {unit.params[0].name: sum(info.nbytes for info in unit.tensors) for unit in units}
    unused_rows = config.vocab_size - TOKENIZER_SIZE
    return plan_memory(
        config,
        sum(sizes.values()),
        available,
        activation_bytes=2,
        kv_bits=kv_bits,
        mappable_bytes=sizes["embed.weight"] + sizes["lm_head.weight"] * unused_rows // config.vocab_size,
    )


def choices(available: int, kv_bits: int | None, every: bool) -> Iterator[tuple[str, str]]:
    """Yield (model, format) for what fits: the best choice, or `every` one."""
    for model, config in MODELS.items():
        plans = {name: plan(config, name, available, kv_bits) for name in FORMATS}
        fitting = [name for name in FORMATS if plans[name].fits]
        comfortable = [name for name in fitting if plans[name].context >= PREFERRED_CONTEXT]
        if every:
            yield from ((model, name) for name in fitting)
        elif fitting:
            yield model, (comfortable or fitting[-1:])[0]
            return


def context(config: ModelConfig, older: MemoryPlan, newer: MemoryPlan) -> str:
    """Say how many tokens fit, and how many on macOS 26 if that differs."""
    longest = config.max_position_embeddings
    first, second = (f"all {longest:,}" if p.context == longest else f"{p.context:,}" for p in (older, newer))
    return first if first == second else f"{first}; on macOS 26 {second}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kv-bits", type=int, choices=[8], help="as mlx-gptoss --kv-bits")
    parser.add_argument("--all", action="store_true", help="every model and format that fits")
    options = parser.parse_args()
    print("| Mac | model and format | weights | context that fits |\n|---:|---|---:|---|")
    for memory, working_sets in WORKING_SETS.items():
        for model, name in choices(working_sets[0], options.kv_bits, options.all):
            older, newer = (plan(MODELS[model], name, available, options.kv_bits) for available in working_sets)
            weights, tokens = gigabytes(older.weights_bytes), context(MODELS[model], older, newer)
            print(f"| {memory} GB | {model}, `{name}` | {weights} | {tokens} |")


if __name__ == "__main__":
    main()
