"""Tune the bundled model on the training mix, from a checkpoint's weights, and write it as a checkpoint.

    python examples/tools/tune_nano.py --from mlx_gptoss/nano --to my-nano --steps 420 --rate 5e-4
    python examples/tools/tune_nano.py --from run-a run-b --to my-nano --steps 0    # the mean of two tuned models

Needs torch. train_nano.py trains from scratch, with larger steps that upset what a trained model knows. Here AdamW
takes small ones on float32 weights, and the rate falls linearly to zero. So the bundled model learned its answers in
JSON. --fused compiles the layers and makes their products in bfloat16: twice as fast.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from pathlib import Path
from random import Random

import nano_tasks as tasks
from nano_export import export, parameters
from nano_model import Nano, on_grid
from requires import torch
from torch import Tensor
from torch.nn import functional as F
from train_nano import BATCHES_A_STEP, IMBALANCE, SHAPE, Batch, Encoder, batches

WARM_UP_STEPS = 20


def tune(
    start: list[Path],
    to: Path,
    steps: int,
    rate: float,
    mix: Mapping[str, float] = tasks.MIX,
    seed: str = "tuning",
    fused: bool = False,
) -> None:
    """Write the mean of the checkpoints in `start`, tuned on conversations drawn from `mix`, to the folder `to`."""
    torch.manual_seed(1)
    encoder, model = Encoder(to), Nano(SHAPE)
    model.load_state_dict(mean_of([parameters(folder) for folder in start]))
    optimizer = torch.optim.AdamW(model.parameters(), betas=(0.9, 0.98), eps=1e-10, weight_decay=0.0)
    source, mean, tokens = batches(encoder, Random(seed), mix), 0.0, 0
    if fused:
        for layer in model.layers:
            layer.compile(dynamic=True)
    for step in range(steps):
        optimizer.param_groups[0]["lr"] = rate * min(1, (step + 1) / WARM_UP_STEPS) * (1 - step / steps)
        optimizer.zero_grad()
        part = next(source)
        targets = sum(int(batch.loss.sum()) for batch in part)
        with on_grid(model), torch.autocast("cpu", torch.bfloat16, enabled=fused):
            loss = sum(backward(model, batch, targets) for batch in part)
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        tokens += sum(batch.ids.numel() for batch in part)
        mean = 0.95 * mean + 0.05 * loss if step else loss
        if (step + 1) % 20 == 0:
            print(f"step {step + 1} of {steps}  {tokens / 1e6:.2f} M tokens  loss {mean:.4f}", flush=True)
    export(model, to)


def mean_of(states: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    """The mean of each parameter over models of one shape."""
    return {name: torch.stack([state[name] for state in states]).mean(0) for name in states[0]}


def weight(text: str) -> tuple[str, float]:
    """A kind and its weight in the mix, from KIND=WEIGHT."""
    kind, _, value = text.partition("=")
    if kind not in tasks.MIX:
        raise argparse.ArgumentTypeError(f"no kind is named {kind!r}; the kinds are {', '.join(tasks.MIX)}")
    return kind, float(value)


def backward(model: Nano, batch: Batch, targets: int) -> float:
    """Add the gradients of one batch to a step with `targets` target tokens; return its share of the loss."""
    where: Tensor = batch.loss[:, :-1]
    hidden, imbalance = model(batch.ids)
    logits = model.lm_head(hidden[:, :-1][where])
    loss = F.cross_entropy(logits.float(), batch.ids[:, 1:][where], reduction="sum") / targets
    (loss + IMBALANCE * imbalance / BATCHES_A_STEP).backward()
    return loss.item()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--from",
        type=Path,
        dest="start",
        nargs="+",
        required=True,
        metavar="FOLDER",
        help="a checkpoint; of several, the mean",
    )
    parser.add_argument("--to", type=Path, required=True, metavar="FOLDER", help="where to write the tuned one")
    parser.add_argument("--steps", type=int, default=420)
    parser.add_argument("--rate", type=float, default=5e-4, help="the highest learning rate")
    parser.add_argument("--weight", type=weight, action="append", default=[], metavar="KIND=WEIGHT", help="in the mix")
    parser.add_argument("--seed", default="tuning", help="of the conversations")
    parser.add_argument("--fused", action="store_true", help="compile the layers (needs a C++ compiler)")
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    mix = {**tasks.MIX, **dict(options.weight)}
    tune(options.start, options.to, options.steps, options.rate, mix, options.seed, options.fused)


if __name__ == "__main__":
    main()
