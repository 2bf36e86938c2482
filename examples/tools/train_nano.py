"""Train the bundled model on a CPU and write it as a checkpoint.

    python examples/tools/train_nano.py train --run runs/nano --tokens 17       # millions; resumes where it stopped
    python examples/tools/train_nano.py export --run runs/nano --to my-nano     # at any time; MXFP4
    python examples/tools/train_nano.py train --run runs/more --from mlx_gptoss/nano --rate 0.5 --tokens 10
    python examples/tools/train_nano.py judge --run runs/judge --from mlx_gptoss/nano --per-kind 200 --seed 3

The third line starts from a checkpoint's weights instead of random ones. The last prints the share of held-out turns,
reasoning included, of which every token is the likeliest one: faster than measure_nano.py, and stricter. All of it
needs torch. Only the assistant's tokens after `<|start|>assistant` count in the loss, unless --prompts is given. The
learning rate follows the tokens seen so far, so a run of any length ends with a full decay, and so does a resumed one
with another --tokens.

`--shape small` is a model of 20 million parameters with 32 experts, to judge formats on. It saw 1.5 million tokens, 36
minutes of one core (`--seed 7 --prompts --rate 2 --batch 1792 --threads 1`, with --tokens 3, 1.8 and 1.5 in turn). The
three batches of a step are computed on a thread each, because threads that share a product wait for each other, which
on a busy machine made them several times as slow.

The bundled model saw 17 million tokens in 99 minutes, on two cores that other programs used too. The run was stopped
and resumed several times with other settings: until minute 34 a step took conversations of one length only (see
`batches`) at up to twice the learning rates, and the last 10 minutes had four times the rates below.
"""

from __future__ import annotations

import argparse
import os
import signal
import time
from collections import defaultdict
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from pathlib import Path
from random import Random
from typing import NamedTuple

import nano_tasks as tasks
from nano_export import export, parameters
from nano_model import Nano, Shape, on_grid
from nano_tokenizer import write_tokenizer
from requires import torch
from torch import Tensor
from torch.nn import functional as F

from mlx_gptoss.harmony.render import render
from mlx_gptoss.tokenizer import Tokenizer

SHAPE = Shape(vocab=384, hidden=192, layers=4, heads=4, kv_heads=2, experts=8, active=4, intermediate=128)
SHAPES = {"nano": SHAPE, "small": Shape(vocab=384, hidden=256, layers=6, heads=4, experts=32, active=4)}
BATCH_TOKENS, BATCHES_A_STEP = 1280, 3
POOL = 1024
PEAK_MUON, PEAK_ADAM = 0.01, 1e-3
WARM_UP, IMBALANCE = 0.02, 0.01
SAVE_EVERY, JUDGE_EVERY = 150.0, 0.1  # seconds; of a run's tokens
# Without AVX-512, torch multiplies bfloat16 on an x86 fifty times as slowly as float32; other processors: not measured.
DTYPE = torch.float32 if torch.backends.cpu.get_cpu_capability() in ("DEFAULT", "AVX2") else torch.bfloat16
JUDGED = 2  # the seed of the judged questions; measure_nano.py asks those of seed 0, nano_eval_text.py of seed 1


Pair = tuple[list[int], list[int]]  # the ids of a prompt, and of the turn that follows it


class Batch(NamedTuple):
    """ids [B, L], padded at the end; loss [B, L], whether what position t predicts counts: the assistant's turn."""

    ids: Tensor
    loss: Tensor


class Encoder:
    """Encodes examples as token ids, with the prompt exactly as the runtime renders it."""

    def __init__(self, folder: Path, prompts: bool = False) -> None:
        """prompts: the tokens before the assistant's turn count in the loss, too."""
        folder.mkdir(parents=True, exist_ok=True)
        self.prompts = prompts
        self.specials = write_tokenizer(folder)
        self.tokenizer = Tokenizer.from_folder(folder)

    def encode(self, example: tasks.Example) -> Pair:
        prompt = render(example.conversation, self.tokenizer)
        return prompt, self.tokenizer.encode_with_specials(example.turn.text())

    def batch(self, pairs: list[Pair]) -> Batch:
        longest = max(map(length, pairs))
        ids = torch.zeros(len(pairs), longest, dtype=torch.long)
        loss = torch.zeros(len(pairs), longest, dtype=torch.bool)
        for row, (prompt, turn) in enumerate(pairs):
            ids[row, : len(prompt) + len(turn)] = torch.tensor(prompt + turn)
            loss[row, 0 if self.prompts else len(prompt) - 1 : len(prompt) + len(turn) - 1] = True
        return Batch(ids, loss)


def length(pair: Pair) -> int:
    return len(pair[0]) + len(pair[1])


def batches(
    encoder: Encoder, r: Random, mix: Mapping[str, float] = tasks.MIX, size: int = BATCH_TOKENS
) -> Iterator[list[Batch]]:
    """Yield the batches of one step, without end; a batch holds conversations of similar length, about `size` tokens.

    A step takes several batches because conversations of one length are mostly of one kind, and steps on a single kind
    make the training unstable.
    """
    while True:
        groups: list[list[Pair]] = [[]]
        for pair in sorted((encoder.encode(tasks.draw(r, mix=mix)) for _ in range(POOL)), key=length):
            if (len(groups[-1]) + 1) * length(pair) > size:
                groups.append([])
            groups[-1].append(pair)
        r.shuffle(groups)
        for start in range(0, len(groups) - BATCHES_A_STEP + 1, BATCHES_A_STEP):
            yield [encoder.batch(group) for group in groups[start : start + BATCHES_A_STEP]]


class Muon(torch.optim.Optimizer):
    """Momentum with updates made orthogonal by five Newton-Schulz steps (Jordan et al. 2024); for [..., out, in]."""

    def __init__(self, parameters: list[Tensor], pool: ThreadPoolExecutor) -> None:
        super().__init__(parameters, {"lr": 0.0})
        self.pool = pool

    def step(self, closure: None = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            list(self.pool.map(lambda p, rate=group["lr"]: self.update(p, rate), group["params"]))

    @torch.no_grad()
    def update(self, p: Tensor, rate: float) -> None:
        momentum = self.state[p].setdefault("momentum", torch.zeros_like(p))
        momentum.lerp_(p.grad, 0.05)
        update = orthogonal(p.grad.lerp(momentum, 0.95))
        p.mul_(1 - 0.01 * rate).sub_(update, alpha=rate * max(1, p.shape[-2] / p.shape[-1]) ** 0.5)


def orthogonal(g: Tensor) -> Tensor:
    wide = g.shape[-2] <= g.shape[-1]
    x = (g if wide else g.mT).to(DTYPE)
    x = x / (x.norm(dim=(-2, -1), keepdim=True) + 1e-7)
    for _ in range(5):
        gram = x @ x.mT
        x = 3.4445 * x + (-4.7750 * gram + 2.0315 * gram @ gram) @ x
    return (x if wide else x.mT).to(g.dtype)


class Run:
    """The state of a training run, saved in `checkpoint.pt`."""

    def __init__(
        self, folder: Path, seed: int = 1, start: Path | None = None, shape: Shape | None = None, threads: int = 1
    ) -> None:
        """start: a folder that `export` wrote; a new run starts from its weights. A resumed run takes the model, its
        shape included, from the run. threads: that compute the batches of a step."""
        torch.manual_seed(seed)
        self.file = folder / "checkpoint.pt"
        saved = torch.load(self.file) if self.file.exists() else None
        self.model = Nano(Shape(**saved["shape"]) if saved else shape or SHAPE)
        if start is not None:
            self.model.load_state_dict(parameters(start))
        names = [n for n, p in self.model.named_parameters() if p.ndim >= 2 and "layers" in n and not skipped(n)]
        matrices = [p for n, p in self.model.named_parameters() if n in names]
        others = [p for n, p in self.model.named_parameters() if n not in names]
        self.pool = ThreadPoolExecutor(threads, initializer=torch.set_num_threads, initargs=(1,))
        self.muon = Muon(matrices, self.pool)
        self.adam = torch.optim.AdamW(others, betas=(0.9, 0.98), eps=1e-10, weight_decay=0.0)
        self.tokens, self.seconds, self.steps = 0, 0.0, 0  # seconds of CPU time
        if saved:
            self.load(saved)

    def load(self, state: dict[str, object]) -> None:
        for name, part in (("model", self.model), ("muon", self.muon), ("adam", self.adam)):
            part.load_state_dict(state[name])  # type: ignore[arg-type]
        self.tokens, self.seconds, self.steps = state["progress"]  # type: ignore[misc]

    def save(self) -> None:
        parts = {name: getattr(self, name).state_dict() for name in ("model", "muon", "adam")}
        progress = {"progress": (self.tokens, self.seconds, self.steps), "shape": asdict(self.model.shape)}
        torch.save({**parts, **progress}, self.file.with_suffix(".new"))
        os.replace(self.file.with_suffix(".new"), self.file)

    def step(self, batches: list[Batch], rate: float) -> float:
        """Take one optimizer step on all the batches; return the mean loss per token."""
        for optimizer, highest in ((self.muon, PEAK_MUON), (self.adam, PEAK_ADAM)):
            optimizer.param_groups[0]["lr"] = rate * highest
        targets = sum(int(batch.loss.sum()) for batch in batches)
        with on_grid(self.model):
            parts = list(self.pool.map(lambda batch: self.gradients(batch, targets), batches))
        for p, gradients in zip(self.model.parameters(), zip(*(part for _, part in parts), strict=True), strict=True):
            p.grad = sum(gradients[1:], gradients[0])
        torch.nn.utils.clip_grad_norm_(self.adam.param_groups[0]["params"], 1.0)
        self.muon.step()
        self.adam.step()
        self.tokens, self.steps = self.tokens + sum(batch.ids.numel() for batch in batches), self.steps + 1
        return sum(loss for loss, _ in parts)

    def gradients(self, batch: Batch, targets: int) -> tuple[float, tuple[Tensor, ...]]:
        """What one batch adds to the loss of a step with `targets` target tokens, and its parameters' gradients."""
        where = batch.loss[:, :-1]
        with torch.autocast("cpu", DTYPE, enabled=DTYPE is torch.bfloat16):
            hidden, imbalance = self.model(batch.ids)
            logits = self.model.lm_head(hidden[:, :-1][where])
        loss = F.cross_entropy(logits.float(), batch.ids[:, 1:][where], reduction="sum") / targets
        whole = loss + IMBALANCE * imbalance / BATCHES_A_STEP
        return loss.item(), torch.autograd.grad(whole, list(self.model.parameters()))


def skipped(name: str) -> bool:
    """Whether Muon leaves a parameter to Adam: the experts' biases are no matrices, and the router learns better so."""
    return "bias" in name or "router" in name


def rate_at(fraction: float) -> float:
    """The learning rate at a fraction of the run, relative to its peak: linear warm-up, then cosine to zero."""
    warm = min(1.0, (fraction + 1e-3) / WARM_UP)
    return warm * 0.5 * (1 + float(torch.cos(torch.tensor(min(1.0, fraction) * torch.pi))))


@torch.no_grad()
def judge(model: Nano, encoder: Encoder, per_kind: int = 24, seed: int = JUDGED) -> dict[str, float]:
    """The share of held-out turns, by kind, that greedy decoding reproduces: every token is the likeliest one."""
    torch.compiler.set_stance("force_eager")
    right: dict[str, list[float]] = defaultdict(list)
    examples = sorted(((e.kind, encoder.encode(e)) for e in tasks.held_out(per_kind, seed)), key=lambda x: len(x[1][0]))
    for start in range(0, len(examples), 24):
        part = examples[start : start + 24]
        batch = encoder.batch([pair for _, pair in part])
        with on_grid(model):
            best = model.lm_head(model(batch.ids)[0][:, :-1]).argmax(-1)
        whole = ((best == batch.ids[:, 1:]) | ~batch.loss[:, :-1]).all(-1)
        for (kind, _), ok in zip(part, whole.tolist(), strict=True):
            right[kind].append(float(ok))
    torch.compiler.set_stance("default")
    return {kind: sum(oks) / len(oks) for kind, oks in right.items()}


def train(
    folder: Path,
    tokens: float,
    fused: bool = False,
    start: Path | None = None,
    peak: float = 1.0,
    shape: Shape | None = None,
    seed: int = 1,
    size: int = BATCH_TOKENS,
    prompts: bool = False,
    threads: int = BATCHES_A_STEP,
) -> None:
    """Train until the run has seen `tokens`.

    peak: the highest learning rates, relative to PEAK_MUON and PEAK_ADAM. size: the tokens of a batch. prompts: as in
    Encoder. fused: compile the layers; then a step takes one thread, because compiling is not thread-safe.
    """
    encoder, run = Encoder(folder, prompts), Run(folder, seed, start, shape, 1 if fused else threads)
    if fused:
        for layer in run.model.layers:
            layer.compile(dynamic=True)
    source = batches(encoder, Random(f"{seed} {run.steps} training"), size=size)
    saved, judged = time.monotonic(), run.tokens
    stops: list[int] = []
    signal.signal(signal.SIGTERM, lambda number, _: stops.append(number))
    mean, before = 0.0, time.process_time()
    while run.tokens < tokens and not stops:
        loss = run.step(next(source), peak * rate_at(run.tokens / tokens))
        mean = loss if mean == 0 else 0.95 * mean + 0.05 * loss
        run.seconds, before = run.seconds + time.process_time() - before, time.process_time()
        if run.steps % 20 == 0:
            done = f"{run.tokens / 1e6:.2f} M tokens  {run.tokens / run.seconds:.0f} a CPU second"
            clock = time.strftime("%H:%M:%S")
            print(f"{clock} {run.seconds / 60:6.1f} min  step {run.steps}  {done}  loss {mean:.4f}", flush=True)
        if time.monotonic() - saved > SAVE_EVERY:
            run.save()
            saved = time.monotonic()
        if run.tokens - judged > JUDGE_EVERY * tokens:
            show(judge(run.model, Encoder(folder), 8))
            judged = run.tokens
    run.save()
    if not stops:
        show(judge(run.model, Encoder(folder), 50))


def show(shares: dict[str, float]) -> None:
    print("held-out: " + "  ".join(f"{kind} {share:.1%}" for kind, share in shares.items()), flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("train", "export", "judge"))
    parser.add_argument("--run", type=Path, required=True, help="folder of the run's state")
    parser.add_argument("--shape", choices=SHAPES, default="nano", help="of a new run's model")
    parser.add_argument("--tokens", type=float, default=17, help="millions, earlier parts of the run included")
    parser.add_argument("--prompts", action="store_true", help="learn the tokens of prompts, too")
    parser.add_argument("--batch", type=int, default=BATCH_TOKENS, help="tokens of each of a step's three batches")
    parser.add_argument("--to", type=Path, help="folder to write the model to")
    parser.add_argument("--fused", action="store_true", help="compile the layers (needs a C++ compiler)")
    parser.add_argument("--from", type=Path, dest="start", metavar="FOLDER", help="start from a checkpoint's weights")
    parser.add_argument("--rate", type=float, default=1.0, help="the highest learning rate, relative to the usual one")
    parser.add_argument("--per-kind", type=int, default=24, help="questions that `judge` asks of each kind")
    parser.add_argument("--seed", type=int, help="of a new run's weights and text (1), or of `judge`'s questions (2)")
    parser.add_argument("--threads", type=int, default=BATCHES_A_STEP)
    options = parser.parse_args()
    if options.what == "train":
        train(
            options.run,
            options.tokens * 1e6,
            options.fused,
            options.start,
            options.rate,
            SHAPES[options.shape],
            options.seed or 1,
            options.batch,
            options.prompts,
            options.threads,
        )
    elif options.what == "judge":
        run = Run(options.run, start=options.start)
        show(judge(run.model, Encoder(options.run), options.per_kind, options.seed or JUDGED))
    elif options.to is None:
        parser.error("export needs --to FOLDER")
    else:
        export(Run(options.run).model, options.to)


if __name__ == "__main__":
    main()
