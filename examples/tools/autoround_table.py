"""Print what symmetric int4 costs: rounded to nearest, learned by AutoRound, and with --calibrate, as Markdown.

    python examples/tools/autoround_table.py [--model PATH] [--text FILE] [--iters 100] [--packages FOLDER]

Experts and attention are quantized in groups of 64, which is what AutoRound does to gpt-oss, on the default calibration
text in 512-token samples; what is compared are predictions on the text of `mlx-gptoss eval`. It needs torch,
transformers and auto-round with what tests/README.md names, in this environment or in a folder that `pip install
--target` has filled. AutoRound runs in a process of its own.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path

import numpy as np

import mlx_gptoss
from mlx_gptoss.api import NANO
from mlx_gptoss.calibration.calibrate import calibrate
from mlx_gptoss.calibration.divergence import kl_divergence, log_softmax
from mlx_gptoss.calibration.forward import Forward
from mlx_gptoss.calibration.linear import Target
from mlx_gptoss.calibration.memory import plan_memory
from mlx_gptoss.calibration.text import read_text, split_documents
from mlx_gptoss.measure.results import mean_of
from mlx_gptoss.weights import checkpoint
from mlx_gptoss.weights.formats import recipe_of
from mlx_gptoss.weights.quantization import quantize_symmetric

GROUP, SAMPLE = 64, 512
FORMAT = "int4-autoround"


def make(source: Path, folder: Path, iters: int) -> None:
    """Let AutoRound quantize the bf16 checkpoint `source`, and leave the result in `folder`. In its own process."""
    from requires import auto_round, torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    opened = checkpoint.open(source)
    ids = [id for window in read_text(None, opened.tokenizer()).windows for id in window]
    samples = [torch.tensor([ids[start : start + SAMPLE]]) for start in range(0, len(ids) - SAMPLE + 1, SAMPLE)]
    tool = auto_round.AutoRound(
        AutoModelForCausalLM.from_pretrained(source, dtype=torch.bfloat16),
        AutoTokenizer.from_pretrained(source),
        bits=4,
        group_size=GROUP,
        sym=True,
        iters=iters,
        seqlen=SAMPLE,
        nsamples=len(samples),
        dataset=samples,
        device_map="cpu",
        enable_torch_compile=False,  # which takes longer than these few iterations
    )
    work = folder.with_suffix(".made")
    tool.quantize_and_save(str(work), format="auto_round")
    next(work.rglob("config.json")).parent.rename(folder)


def networks(model: Path, folder: Path, iters: int) -> Mapping[str, Forward]:
    """The networks to compare, by the name of their row."""
    mlx_gptoss.convert(model, folder / "bf16", "bf16")
    source = checkpoint.open(folder / "bf16")
    words = [sys.executable, __file__, "--make", str(folder / "autoround"), "--model", str(folder / "bf16")]
    started = time.monotonic()
    if code := subprocess.run([*words, "--iters", str(iters)], stdout=sys.stderr).returncode:
        sys.exit(code)
    print(f"AutoRound took {time.monotonic() - started:.0f} s", file=sys.stderr)
    recipe = recipe_of(FORMAT)[1]
    target = Target.of(source, {**recipe, "attention": recipe["experts"]}, symmetric=True)
    text = read_text(None, source.tokenizer())
    memory = plan_memory(source.config, text.tokens, max(text.lengths))
    ours = calibrate(source, target, text, memory, folder / "calibrated", lambda done, total, what: None)
    original = Forward(source)
    nearest = {name: quantize_symmetric(source.read(name)) for name in target.specs}
    return {
        "": original,
        "rounded to nearest": original.with_replaced(nearest),
        f"AutoRound, {iters} iterations": Forward(checkpoint.open(folder / "autoround")),
        "`--calibrate`": Forward(ours),
    }


def log_probabilities(network: Forward, windows: list[list[int]]) -> np.ndarray:
    ids, lengths = [id for window in windows for id in window], [len(window) for window in windows]
    *_, last = network.streams(ids, lengths)
    return log_softmax(network.logits(last))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, default=NANO)
    parser.add_argument("--text", type=Path, default=NANO / "eval.txt", help="documents end with <|endoftext|>")
    parser.add_argument("--iters", type=int, default=100)
    parser.add_argument("--packages", type=Path, help="a folder with auto-round and what it needs")
    parser.add_argument("--make", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.make:
        make(options.model, options.make, options.iters)
        return
    if options.packages:
        paths = [str(options.packages.resolve()), *filter(None, [os.environ.get("PYTHONPATH")])]
        os.environ["PYTHONPATH"] = os.pathsep.join(paths)
    tokenizer = checkpoint.open(options.model).tokenizer()
    windows = [tokenizer.encode_with_specials(part) for part in split_documents(options.text.read_text("utf-8"))]
    place = np.repeat(np.arange(len(windows)), [len(window) for window in windows])
    with tempfile.TemporaryDirectory() as folder:
        rows = dict(networks(options.model, Path(folder), options.iters))
        wanted = log_probabilities(rows.pop(""), windows)
        print(f"{len(place)} tokens\n\n| experts and attention in symmetric int4 | KL mean |\n|---|---:|")
        for name, network in rows.items():
            kl = mean_of(kl_divergence(wanted, log_probabilities(network, windows)), place)
            print(f"| {name} | {kl.mean:.3f} ± {kl.error:.3f} |", flush=True)


if __name__ == "__main__":
    main()
