"""A model that is closed or dropped leaves no object, thread, descriptor or mapping behind; see leaks.py for bytes."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).parent
COUNT = """
import gc, os, sys, weakref
sys.path.insert(0, sys.argv[1])
import leaks, psutil, mlx_gptoss
from mlx_gptoss.engine import Engine
from mlx_gptoss.harmony.grammar import Grammar, Vocabulary
from mlx_gptoss.tokenizer import Tokenizer

how, backend = sys.argv[2:]
one, process = leaks.ROUNDS[how], psutil.Process()
for _ in range(2):  # imports, and what libraries set up once
    one(backend)
gc.collect()
gc.disable()  # what only the collector would find stays in memory for long
kinds = (mlx_gptoss.Model, Engine, Tokenizer, Vocabulary, Grammar)
count = lambda: sum(type(o) in kinds for o in gc.get_objects())
mapped = lambda: sum(m.path.endswith(".safetensors") for m in process.memory_maps()) if sys.platform == "linux" else 0
objects, threads, files = len(gc.get_objects()), process.num_threads(), process.num_fds()
for _ in range(3):
    one(backend)
assert count() == 0, [type(o) for o in gc.get_objects() if type(o) in kinds]
assert leaks.settled(process, threads) <= threads, (threads, process.num_threads())
assert process.num_fds() <= files, (files, process.num_fds())
assert mapped() == 0
more = len(gc.get_objects()) - objects
gc.collect()
print(more, len(gc.get_objects()) - objects)
assert len(gc.get_objects()) - objects < 50
"""


def run(*words: str) -> str:
    """Run Python in a process of its own, whose memory is not the tests'. Returns what it prints."""
    done = subprocess.run([sys.executable, *words], capture_output=True, text=True, cwd=HERE.parent)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.mark.parametrize("how", ["plain", "guided", "careless"])
@pytest.mark.parametrize("backend", ["mlx", "cuda"])
def test_nothing_is_left_of_a_closed_model(backend_module, backend, how):
    backend_module(backend)
    run("-c", COUNT, str(HERE), how, backend)


@pytest.mark.slow
@pytest.mark.parametrize("how", ["plain", "guided", "careless"])
@pytest.mark.parametrize("backend", ["mlx", "cuda"])
def test_memory_is_flat(backend_module, backend, how):
    backend_module(backend)
    run(str(HERE / "leaks.py"), "400", "--backend", backend, f"--{how}")


FORK = """
import os, signal, sys
import mlx_gptoss

def load():
    return mlx_gptoss.load(None, backend=sys.argv[1], device="cpu", max_context=256)

def attempt(name, use):
    try:
        print(name, use(), flush=True)
    except mlx_gptoss.GptOssError as error:
        print(name, "raised", error, flush=True)

model = load()
stream, raw = model.stream("Hi", max_tokens=200), model.stream_raw([1], max_tokens=200)
if os.fork() == 0:
    signal.alarm(60)  # what waits for the parent's threads never ends
    attempt("generate", lambda: model.generate("Hi"))
    attempt("stream", lambda: model.stream("Hi"))
    attempt("complete", lambda: model.complete([1], max_tokens=1))
    attempt("logits", lambda: model.logits([1]))
    attempt("status", lambda: model.status)
    attempt("peak_memory", lambda: model.peak_memory())
    attempt("next", lambda: next(stream))
    attempt("ready", lambda: raw.ready())
    attempt("close stream", lambda: stream.close())
    attempt("close", lambda: model.close())
    attempt("close again", lambda: model.close())
    if sys.argv[1] == "mlx":
        attempt("load", load)
    sys.exit()
_, status = os.wait()
print("child", status)
print("parent", len(model.generate("Hi", max_tokens=2).ids))
model.close()
"""


@pytest.mark.parametrize("backend", ["mlx", "cuda"])
def test_use_after_fork_raises_at_once(backend_module, backend):
    backend_module(backend)
    said = run("-c", FORK, backend).splitlines()
    refused = [line.partition(" raised ")[0] for line in said if "was forked" in line]
    uses = ["generate", "stream", "complete", "logits", "status", "peak_memory", "next", "ready"]
    assert refused == uses + ["load"] * (backend == "mlx"), said
    rest = [line for line in said if "was forked" not in line]
    assert rest == ["close stream None", "close None", "close again None", "child 0", "parent 2"]
