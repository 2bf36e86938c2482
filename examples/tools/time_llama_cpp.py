"""Time this CPU's prefill and decode, llama.cpp's and ours in turns, on synthetic weights of the same shapes.

python examples/tools/write_gguf.py 20b 4 FILE.gguf
python examples/tools/time_llama_cpp.py FILE.gguf 20b 4 [--format mlx-mxfp4-q8] [--batch 1 4 8] [--busy 2]

FILE.gguf has experts in MXFP4 and the rest in Q8_0. Sequences of a batch are prefilled one after the other and decoded
together. --busy N keeps N other programs running without a pause. --only times one of the two, where memory does not
hold both, and prints its peak memory.
"""

import argparse
import resource
import subprocess
import sys
import time
from itertools import product
from statistics import median

import numpy as np

from mlx_gptoss.backends import find_backend
from mlx_gptoss.backends.base import Limits
from mlx_gptoss.machine import cores
from mlx_gptoss.measure.timing import Case, OurEngine
from mlx_gptoss.weights import checkpoint
from mlx_gptoss.weights.checkpoint import CheckpointLike
from mlx_gptoss.weights.synthetic import Synthetic, preset

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("file", metavar="FILE.gguf")
parser.add_argument("preset", choices=["20b", "120b", "tiny"])
parser.add_argument("layers", type=int)
parser.add_argument("--format", default="mxfp4", help="of our weights")
parser.add_argument("--weights", metavar="FOLDER", help="with our weights, instead of generating them")
parser.add_argument("--only", choices=["ours", "llama.cpp"])
parser.add_argument("--prompt", type=int, nargs="+", default=[16, 128, 512], metavar="N")
parser.add_argument("--generate", type=int, default=16, metavar="N")
parser.add_argument("--batch", type=int, nargs="+", default=[1], metavar="B")
parser.add_argument("--turns", type=int, default=3, metavar="N")
parser.add_argument("--busy", type=int, default=0, metavar="N")


class LlamaCpp:
    """llama.cpp on all cores."""

    def __init__(self, path: str, tokens: int, sequences: int) -> None:
        from requires import llama_cpp as llama

        self.llama = llama
        llama.llama_backend_init()
        self.model = llama.llama_model_load_from_file(path.encode(), llama.llama_model_default_params())
        self.vocab = llama.llama_vocab_n_tokens(llama.llama_model_get_vocab(self.model))
        options = llama.llama_context_default_params()
        options.n_ctx, options.n_seq_max = tokens * sequences, sequences
        options.n_batch, options.n_ubatch = tokens, 512
        options.n_threads = options.n_threads_batch = cores()
        self.context = llama.llama_init_from_model(self.model, options)
        self.batch = llama.llama_batch_init(tokens, 0, 1)

    def feed(self, rows: dict[int, list[int]], start: int) -> list[int]:
        """Feed tokens of some sequences at positions from `start`; return the likeliest next token of each."""
        batch, n, ends = self.batch, 0, []
        for sequence, ids in rows.items():
            for i, token in enumerate(ids):
                batch.token[n], batch.pos[n], batch.logits[n] = token, start + i, i == len(ids) - 1
                batch.n_seq_id[n], batch.seq_id[n][0] = 1, sequence
                n += 1
            ends.append(n - 1)
        batch.n_tokens = n
        assert self.llama.llama_decode(self.context, batch) == 0
        logits = (self.llama.llama_get_logits_ith(self.context, end) for end in ends)
        return [int(np.ctypeslib.as_array(row, (self.vocab,)).argmax()) for row in logits]

    def run(self, sequences: int, prompt: int, generate: int, turn: int) -> tuple[float, float]:
        """Tokens per second of prefill and of decode."""
        self.llama.llama_memory_clear(self.llama.llama_get_memory(self.context), True)
        prompts = np.random.default_rng(turn).integers(0, self.vocab, (sequences, prompt)).tolist()
        began = time.perf_counter()
        tokens = [self.feed({i: ids}, 0)[0] for i, ids in enumerate(prompts)]
        fed = time.perf_counter()
        for step in range(generate):
            tokens = self.feed({i: [token] for i, token in enumerate(tokens)}, prompt + step)
        seconds = time.perf_counter() - fed
        return sequences * prompt / (fed - began), sequences * generate / seconds


class Ours:
    """The mlx backend on all cores."""

    def __init__(self, source: CheckpointLike, tokens: int, sequences: int) -> None:
        module, name = find_backend("mlx")
        limits = Limits(sequences, tokens, module.prefill_chunk("cpu"))
        runner = module.load(source, device="cpu", dtype=None, limits=limits)
        self.engine = OurEngine(runner, name, "cpu", source.format, 0.0)

    def run(self, sequences: int, prompt: int, generate: int, turn: int) -> tuple[float, float]:
        """Tokens per second of prefill and of decode."""
        if turn == 0:
            self.engine.begin(Case(sequences, prompt, prompt, generate))
        seconds = self.engine.prefill()
        return sequences * prompt / seconds, sequences * generate / self.engine.decode()


chosen = parser.parse_args()
longest = max(chosen.prompt) + 2 * chosen.generate + 32
engines: dict[str, Ours | LlamaCpp] = {}
if chosen.only != "ours":
    engines["llama.cpp"] = LlamaCpp(chosen.file, longest, max(chosen.batch))
if chosen.only != "llama.cpp":
    generated = Synthetic(preset(chosen.preset, chosen.layers), chosen.format)
    source = checkpoint.open(chosen.weights) if chosen.weights else generated
    engines["ours"] = Ours(source, longest, max(chosen.batch))
busy = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(chosen.busy)]
try:
    for prompt, sequences in product(chosen.prompt, chosen.batch):
        turns = [
            {name: engine.run(sequences, prompt, chosen.generate, n) for name, engine in engines.items()}
            for n in range(chosen.turns)
        ]
        for i, what in enumerate(("prefill", "decode")):
            speed = {name: median(run[name][i] for run in turns) for name in engines}
            shown = ", ".join(f"{name} {speed[name]:.1f}" for name in engines)
            ratio = "" if chosen.only else f", ratio {speed['ours'] / speed['llama.cpp']:.2f}"
            of = f"{prompt} tokens" if sequences == 1 else f"{sequences} sequences of {prompt} tokens"
            print(f"{of}, {what}: {shown} tok/s{ratio}", flush=True)
    if chosen.only:
        print(f"peak memory: {resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6:.1f} GB")
finally:
    for program in busy:
        program.kill()
    if isinstance(ours := engines.get("ours"), Ours):
        ours.engine.close()
