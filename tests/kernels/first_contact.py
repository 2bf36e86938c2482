"""What to run first on a new NVIDIA GPU: `python tests/kernels/first_contact.py [--out FOLDER] [--minutes 25]`.

Correctness comes before speed: versions, the kernels' own tests, races, the bundled model against a CPU; then tiles,
speed with one and with many sequences, where a step's time goes, and long prompts. Each stage is a process of its own
with a time limit. What it prints is shown, and kept in FOLDER/first_contact.json as it comes, so nothing is lost when a
stage fails or hangs, time runs out, or Ctrl-C ends it. At the end FOLDER/first_contact.png is drawn.

Without a GPU it runs in Triton's interpreter at tiny sizes (set TRITON_INTERPRET=1), which tries this program alone.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import selectors
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
LEAST_S = 15.0  # a stage that has less time left is not begun
FORMATS = ("mxfp4", "mlx-4bit")


@dataclass(frozen=True)
class Stage:
    """name: in the report. words: of the command. limit_s: after so long it is ended. needed: whether the stages after
    it make no sense if it fails."""

    name: str
    words: tuple[str, ...]
    limit_s: float
    needed: bool = False


@dataclass
class Result:
    """What came of a stage. state: "passed", "failed", "out of time", "interrupted" or "not begun".
    found: the JSON objects that it printed. lines: what else it printed, the last 400 lines."""

    stage: str
    state: str = "not begun"
    seconds: float = 0.0
    found: list[Any] = field(default_factory=list)
    lines: list[str] = field(default_factory=list)


def stages(tiny: bool) -> list[Stage]:
    """In their order. tiny: for Triton's interpreter."""
    python = sys.executable
    bench = (python, "-m", "mlx_gptoss_cli", "bench", "--backend", "cuda", "--json", "--synthetic")
    if tiny:
        bench += ("tiny", "--device", "cpu", "--layers", "2", "--repeat", "1")
        tests = (python, "-m", "pytest", "-n", "0", "-q", "tests/kernels/test_sample.py")
        speed = ("--prompt", "16", "--generate", "4", "--batch", "1", "--batch", "2")
        prompts = [("--prompt", "32", "--generate", "1"), ("--prompt", "64", "--generate", "1")]
    else:
        bench += ("20b",)
        tests = (python, "-m", "pytest", "-q", "-n", "12", "tests/kernels", "-k", "not sanitizer")
        tests += ("--ignore", "tests/kernels/test_compile.py", "--ignore", "tests/kernels/test_memory.py")
        speed = ("--prompt", "1024", "--generate", "128", "--batch", "1", "--batch", "32")
        prompts = [("--prompt", "8192", "--generate", "8"), ("--prompt", "131000", "--generate", "32", "--repeat", "1")]
    tune = (python, "tests/kernels/tune.py", "--format", *FORMATS)
    rows = ("--rows", "1", "2") if tiny else ("--rows", "1", "32")
    profile = ("--layers", "2") if tiny else ("--rows", "1", "4", "32")  # 4: a token with three drafts
    all_of_it = [
        Stage("versions", (python, "tests/kernels/first_contact.py", "--versions"), 60, needed=True),
        Stage("kernels against float64", tests, 420),
        Stage("race", (python, "tests/kernels/race.py"), 180),
        Stage("bundled model", (python, "tests/kernels/first_contact.py", "--bundled"), 120),
        Stage("tiles in use", (*tune, "--tiles", "0", *rows, "--context"), 120),
        *(Stage(f"speed {form}", (*bench, "--format", form, *speed), 180) for form in FORMATS),
        Stage("profile", (python, "tests/kernels/profile_step.py", *profile), 240),
        *(Stage(f"prompt of {p[1]}", (*bench, "--format", "mxfp4", *p), 150) for p in prompts),
        Stage("other tiles, experts", (*tune, "--case", "experts", *rows, "--context"), 300),
        Stage("other tiles, qkv and output", (*tune, "--case", "qkv", "out", *rows, "--context"), 300),
        Stage("8-bit K/V", (*bench, "--format", "mxfp4", "--kv-bits", "8", *prompts[1]), 150),
        Stage("drafts", (*bench, "--format", "mxfp4", "--speculate", *speed[:4]), 120),
    ]
    # A GPU's limits say nothing of the interpreter, which shares the cores with other programs.
    return [replace(stage, limit_s=10 * stage.limit_s) for stage in all_of_it] if tiny else all_of_it


def run(stage: Stage, result: Result, limit_s: float) -> None:
    """Run a stage for at most so long; `result` is filled as it goes. Ctrl-C ends the stage, and is raised."""
    began = time.monotonic()
    root = HERE.parents[1]
    environment = os.environ | {"PYTHONUNBUFFERED": "1", "PYTHONPATH": str(root)}
    process = subprocess.Popen(
        stage.words,
        cwd=root,
        env=environment,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        start_new_session=True,
    )
    try:
        for line in _lines(process, began + limit_s):
            _keep(line, result)
        result.state = "out of time" if process.poll() is None else ("failed" if process.wait() else "passed")
    except KeyboardInterrupt:
        result.state = "interrupted"
        raise
    finally:
        _end(process)
        result.seconds = round(time.monotonic() - began, 1)


def _lines(process: subprocess.Popen[bytes], deadline: float) -> Iterator[str]:
    """The lines that a process prints until it ends or the deadline passes."""
    assert process.stdout is not None
    descriptor, rest = process.stdout.fileno(), b""
    with selectors.DefaultSelector() as selector:
        selector.register(descriptor, selectors.EVENT_READ)
        while (left := deadline - time.monotonic()) > 0:
            if not selector.select(min(left, 1.0)):
                continue
            data = os.read(descriptor, 1 << 16)
            if not data:
                process.wait(timeout=max(1.0, left))
                break
            *whole, rest = (rest + data).split(b"\n")
            yield from (line.decode(errors="replace") for line in whole)
    if rest:
        yield rest.decode(errors="replace")


def _keep(line: str, result: Result) -> None:
    """Show a line, and keep it as a JSON object or as text."""
    print(f"  {line[:200]}", flush=True)
    if line.startswith("{"):
        try:
            result.found.append(json.loads(line))
            return
        except ValueError:
            pass
    result.lines = [*result.lines[-399:], line]


def _end(process: subprocess.Popen[bytes]) -> None:
    """End a stage and what it has started."""
    for number in (signal.SIGTERM, signal.SIGKILL):
        if process.poll() is not None:
            return
        try:
            os.killpg(process.pid, number)
            process.wait(timeout=10)
        except (ProcessLookupError, subprocess.TimeoutExpired):
            continue


def save(results: Sequence[Result], path: Path) -> None:
    """Write all results, whole or not at all."""
    part = path.with_suffix(".part")
    part.write_text(json.dumps([asdict(result) for result in results], indent=1))
    part.replace(path)


def versions() -> dict[str, Any]:
    """Of this machine; "interpreted" must be false on a GPU."""
    import torch
    import triton

    from mlx_gptoss.backends.cuda.kernels.interpreter import INTERPRETED
    from mlx_gptoss.backends.cuda.kernels.tiles import capability

    gpu = torch.cuda.is_available()
    found: dict[str, Any] = {
        "torch": torch.__version__,
        "triton": triton.__version__,
        "cuda": torch.version.cuda,
        "interpreted": bool(INTERPRETED.value),
        "python": sys.version.split()[0],
        "gpu": torch.cuda.get_device_name() if gpu else None,
        "capability": capability(torch.device("cuda", 0)) if gpu else None,
        "memory_bytes": torch.cuda.mem_get_info() if gpu else None,
    }
    if gpu:
        query = "name,driver_version,pcie.link.gen.current,clocks.max.sm,clocks.max.mem,power.limit"
        words = ["nvidia-smi", f"--query-gpu={query}", "--format=csv,noheader"]
        found["nvidia-smi"] = subprocess.run(words, capture_output=True, text=True, check=False).stdout.strip()
    return found


def bundled() -> dict[str, Any]:
    """The bundled model in bfloat16 with the kernels, against float32 on the CPU: KL of its next-token distributions,
    and whether the greedy answer is the same. Then a cache in 8 bits and drafts, against the same kernels without."""
    import numpy as np
    import torch

    import mlx_gptoss
    from mlx_gptoss.api import NANO

    gpu = torch.cuda.is_available()
    prompt = "What is 12 + 30? Reverse the word planet. What is the capital of France?"
    answers, logits = [], []
    device = None if gpu else "cpu"
    for options in ({"device": "cpu"}, {"device": device}, {"device": device, "kv_bits": 8, "speculate": True}):
        with mlx_gptoss.load(NANO, backend="cuda", **options) as model:
            ids = model.tokenizer.encode(prompt)
            logits.append(model.logits(ids).astype(np.float64))
            answers.append(model.generate(prompt, max_tokens=48, temperature=0).text)
    wide = [values - values.max(-1, keepdims=True) for values in logits]
    logprobs = [values - np.log(np.exp(values).sum(-1, keepdims=True)) for values in wide]
    kl, packed = ((np.exp(p) * (p - q)).sum(-1) for p, q in itertools.pairwise(logprobs))
    return {
        "kl_mean": float(kl.mean()),
        "kl_max": float(kl.max()),
        "same_answer": answers[0] == answers[1],
        "kl_mean_8_bit_kv": float(packed.mean()),
        "same_answer_8_bit_kv_and_drafts": answers[1] == answers[2],
    }


def draw(results: Sequence[Result], path: Path) -> None:
    """Speeds beside what the bytes allow, and the kernels of a step."""
    import matplotlib.pyplot as plt

    speeds = [(r.stage.removeprefix("speed "), m) for r in results for m in measurements(r)]
    profiles = [found for r in results if r.stage == "profile" for found in r.found]
    figure, axes = plt.subplots(1 + len(profiles), 1, figsize=(10, 3 + 3 * len(profiles)), squeeze=False)
    rows = axes[:, 0]
    names = [f"{name}, batch {m['batch']}, {m['context']} before" for name, m in speeds]
    rows[0].barh(names, [m["decode_tok_s"] for _, m in speeds], color="#4a7ebb")
    rows[0].set_xlabel("decoded tokens per second")
    rows[0].invert_yaxis()
    for axis, found in zip(rows[1:], profiles, strict=True):
        top = list(found["kernels"].items())[:12]
        axis.barh([f"{name} x {k['count']:g}" for name, k in top], [k["us"] for _, k in top], color="#7a9a4a")
        axis.set_xlabel(f"us of a step of {found['step_us']} us ({found['format']}, {found['rows']} rows)")
        axis.invert_yaxis()
    figure.tight_layout()
    figure.savefig(path, dpi=110)


def measurements(result: Result) -> Iterator[dict[str, Any]]:
    """What the bench stages measured, as `bench --json` prints it: batch, context, prefill_tok_s, decode_tok_s, ..."""
    return (measured for found in result.found for measured in found.get("results", []))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("first_contact"), metavar="FOLDER")
    parser.add_argument("--minutes", type=float, default=25)
    parser.add_argument("--only", nargs="+", metavar="STAGE", help="Only stages whose names contain one of these.")
    parser.add_argument("--versions", action="store_true", help="Print the versions alone.")
    parser.add_argument("--bundled", action="store_true", help="Compare the bundled model alone.")
    options = parser.parse_args()
    if options.versions or options.bundled:
        print(json.dumps(versions() if options.versions else bundled()))
        return
    import torch

    parts = options.only or [""]
    chosen = [stage for stage in stages(not torch.cuda.is_available()) if any(part in stage.name for part in parts)]
    options.out.mkdir(parents=True, exist_ok=True)
    deadline = time.monotonic() + 60 * options.minutes
    results = [Result(stage.name) for stage in chosen]
    try:
        for stage, result in zip(chosen, results, strict=True):
            left = deadline - time.monotonic()
            if left < LEAST_S:
                break
            print(f"{stage.name} (at most {min(left, stage.limit_s):.0f} s)", flush=True)
            run(stage, result, min(left, stage.limit_s))
            print(f"  {result.state} after {result.seconds} s", flush=True)
            save(results, options.out / "first_contact.json")
            if stage.needed and result.state != "passed":
                break
    except KeyboardInterrupt:
        print("interrupted", flush=True)
    save(results, options.out / "first_contact.json")
    draw(results, options.out / "first_contact.png")
    print(", ".join(f"{result.stage}: {result.state}" for result in results))
    print(f"in {options.out}: first_contact.json, first_contact.png")
    sys.exit(any(result.state != "passed" for result in results))


if __name__ == "__main__":
    main()
