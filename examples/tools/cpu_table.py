"""Time four layers of gpt-oss-20b on this CPU in several engines, when it is idle and while two other programs run.

python examples/tools/cpu_table.py FOLDER      keeps 8 GB of synthetic weights there; 10 minutes on two idle cores

Each command is printed before its output. llama.cpp, mlx-lm and transformers run in turns with ours, if installed.
"""

import subprocess
import sys
import time
from importlib.util import find_spec
from pathlib import Path

from mlx_gptoss.weights.synthetic import Synthetic, preset

TOOLS = Path(__file__).parent
LAYERS, LAYERS_IN_FLOAT32 = "4", "2"  # transformers decodes experts to float32 when it loads
BENCH = ["-m", "mlx_gptoss_cli", "bench", "--synthetic", "20b", "--backend", "mlx", "--layers"]
BRIEFLY = ["--prompt", "16", "--generate", "4", "--repeat", "1", "--against"]


def run(*words: str) -> None:
    """Run a Python program and print its command, its output and how long it took."""
    print(f"\n$ python {' '.join(words)}", flush=True)
    began = time.perf_counter()
    done = subprocess.run([sys.executable, *words], stderr=subprocess.PIPE, text=True)
    print(f"({time.perf_counter() - began:.0f} s)" + (f"\n{done.stderr[-800:]}" if done.returncode else ""), flush=True)


def load(folder: Path) -> None:
    """Time our load and mlx-lm's in turns, each in a process of its own, from the page cache."""
    ours = (
        "from mlx_gptoss.weights import checkpoint; from mlx_gptoss.backends import mlx; "
        "from mlx_gptoss.backends.base import Limits; import time; began = time.perf_counter(); "
        f"mlx.load(checkpoint.open({str(folder)!r}), device='cpu', dtype=None, limits=Limits(1, 4096, 512)); "
        "print(f'ours {time.perf_counter() - began:.1f} s')"
    )
    theirs = (
        "import time, mlx.core as mx; from pathlib import Path; from mlx_lm.utils import load_model; "
        f"began = time.perf_counter(); mx.eval(load_model(Path({str(folder)!r}))[0].parameters()); "
        "print(f'mlx-lm {time.perf_counter() - began:.1f} s')"
    )
    for code in (ours, theirs) * 3 if find_spec("mlx_lm") else (ours,) * 3:
        subprocess.run([sys.executable, "-c", code], stderr=subprocess.DEVNULL)


folder = Path(sys.argv[1])
checkpoint, file = folder / "mxfp4", folder / "20b.gguf"
if not checkpoint.exists():
    Synthetic(preset("20b", int(LAYERS)), "mxfp4").write(checkpoint)
if find_spec("llama_cpp"):
    if not file.exists():
        run(str(TOOLS / "write_gguf.py"), "20b", LAYERS, str(file))
    compare = (str(TOOLS / "time_llama_cpp.py"), str(file), "20b", LAYERS)
    run(*compare, "--prompt", "16", "128", "512", "2048")
    run(*compare, "--prompt", "128", "--batch", "4", "8")
    run(*compare, "--prompt", "4096", "--turns", "1")
    run(*compare, "--prompt", "128", "512", "--busy", "2")
    run(*compare, "--prompt", "128", "--format", "mlx-mxfp4-q8")
    for engine in ("ours", "llama.cpp"):
        run(*compare, "--prompt", "128", "--turns", "1", "--weights", str(checkpoint), "--only", engine)
run(*BENCH, LAYERS, "--prompt", "128", "--generate", "16", "--batch", "1", "--batch", "4", "--batch", "8")
run(*BENCH, LAYERS, "--prompt", "2048", "--generate", "16", "--context", "4096", "--repeat", "1")
if find_spec("mlx_lm"):
    run(*BENCH, LAYERS, *BRIEFLY, "mlx-lm", "--against-dtype", "float32")
if find_spec("transformers"):
    run(*BENCH, LAYERS_IN_FLOAT32, *BRIEFLY, "transformers")
print("\nLoading 4.2 GB from the page cache:")
load(checkpoint)
