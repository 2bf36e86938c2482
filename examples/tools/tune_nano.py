"""Tune the bundled model on the training mix, from a checkpoint's weights, and write it as a checkpoint.

    python examples/tools/tune_nano.py --from mlx_gptoss/nano --to my-nano --steps 420 --rate 5e-4

Needs torch. train_nano.py trains from scratch, with larger steps that upset what a trained model knows. Here AdamW
takes small ones in float32, and the rate falls linearly to zero. So the bundled model learned its answers in JSON.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from random import Random

from nano_export import export, parameters
from nano_model import Nano, on_grid
from requires import torch
from torch import Tensor
from torch.nn import functional as F
from train_nano import BATCHES_A_STEP, IMBALANCE, SHAPE, Batch, Encoder, batches

WARM_UP_STEPS = 20


def tune(start: Path, to: Path, steps: int, rate: float) -> None:
    torch.manual_seed(1)
    encoder, model = Encoder(to), Nano(SHAPE)
    model.load_state_dict(parameters(start))
    optimizer = torch.optim.AdamW(model.parameters(), betas=(0.9, 0.98), eps=1e-10, weight_decay=0.0)
    source, mean, tokens = batches(encoder, Random("tuning")), 0.0, 0
    for step in range(steps):
        optimizer.param_groups[0]["lr"] = rate * min(1, (step + 1) / WARM_UP_STEPS) * (1 - step / steps)
        optimizer.zero_grad()
        part = next(source)
        targets = sum(int(batch.loss.sum()) for batch in part)
        with on_grid(model):
            loss = sum(backward(model, batch, targets) for batch in part)
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        tokens += sum(batch.ids.numel() for batch in part)
        mean = 0.95 * mean + 0.05 * loss if step else loss
        if (step + 1) % 20 == 0:
            print(f"step {step + 1} of {steps}  {tokens / 1e6:.2f} M tokens  loss {mean:.4f}", flush=True)
    export(model, to)


def backward(model: Nano, batch: Batch, targets: int) -> float:
    """Add the gradients of one batch to a step with `targets` target tokens; return its share of the loss."""
    where: Tensor = batch.loss[:, :-1]
    hidden, imbalance = model(batch.ids)
    logits = model.lm_head(hidden[:, :-1][where])
    loss = F.cross_entropy(logits, batch.ids[:, 1:][where], reduction="sum") / targets
    (loss + IMBALANCE * imbalance / BATCHES_A_STEP).backward()
    return loss.item()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--from", type=Path, dest="start", required=True, metavar="FOLDER", help="a checkpoint")
    parser.add_argument("--to", type=Path, required=True, metavar="FOLDER", help="where to write the tuned one")
    parser.add_argument("--steps", type=int, default=420)
    parser.add_argument("--rate", type=float, default=5e-4, help="the highest learning rate")
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    tune(options.start, options.to, options.steps, options.rate)


if __name__ == "__main__":
    main()
