"""Print what each format costs in quality: a checkpoint in every format against its bfloat16 conversion, as Markdown.

    python examples/tools/format_table.py [--model PATH] [--text FILE] [FORMAT[+mse|+calibrate[@BITS]] ...]

The default is every writable format, and the 4-bit and 3-bit ones also with `--search mse` and `--calibrate` where they
have them; @BITS is --bits-per-weight. The text is that of `mlx-gptoss eval`, of which neither training nor calibration
saw a question."""

import argparse
import tempfile
from pathlib import Path

import mlx_gptoss
from mlx_gptoss.api import NANO
from mlx_gptoss.weights.formats import WRITERS

OPTIONS = {"": {}, "mse": {"search": "mse"}, "calibrate": {"calibrate": True}}
CHOSEN = (
    "mlx-4bit+mse", "mlx-4bit+calibrate", "mlx-mxfp4-q4+mse", "mlx-mxfp4-q4+calibrate", "mlx-3bit+calibrate",
    "int4-autoround+calibrate", "mlx-4bit+calibrate@4.58", "mlx-4bit+calibrate@4", "mlx-mxfp4-q4+calibrate@4.8",
)  # fmt: skip


def title(name: str) -> str:
    """A format with the options of `convert` that made it."""
    return name.replace("+", "` `--").replace("--mse", "--search mse").replace("@", " --bits-per-weight ")


parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("formats", nargs="*", metavar="FORMAT")
parser.add_argument("--model", default=NANO, type=Path)
parser.add_argument("--text", type=Path)
parser.add_argument("--also", type=Path, action="append", default=[], help="a finished checkpoint to list as well")
options = parser.parse_args()
names = ["bf16", *(name for name in options.formats or (*WRITERS, *CHOSEN) if name != "bf16")]
text = options.text and options.text.read_text("utf-8")
with tempfile.TemporaryDirectory() as folder:
    paths = {name: Path(folder) / name for name in names}
    for name, path in paths.items():
        to, _, how = name.partition("+")
        how, _, bits = how.partition("@")
        mlx_gptoss.convert(options.model, path, to=to, **OPTIONS[how], bits_per_weight=float(bits) if bits else None)
    found = mlx_gptoss.evaluate(*paths.values(), *options.also, against=paths["bf16"], text=text)
    channels = [name for name, _ in found[0].against[0].by_channel()]
    print(f"{found[0].tokens} tokens\n")
    print(
        "| format | size | bits per weight | perplexity | KL mean |", "".join(f" {name} |" for name in channels), end=""
    )
    print(" KL p99 | top-1 | exact replies |\n|---|" + "---:|" * (7 + len(channels)))
    for result in sorted(found, key=lambda result: result.against[0].kl_mean):
        kl = result.against[0]
        cells = [
            f"`{title(Path(result.model).name)}`",
            f"{result.size_bytes / 1e6:.2f} MB",
            f"{result.bits_per_weight:.2f}",
            f"{result.perplexity:.4f}",
            f"{kl.kl_mean:.2g} ± {kl.kl_error:.1g}" if kl.kl_mean > 1e-9 else "0",
            *(f"{part.kl_mean:.1e}" if part.kl_mean > 1e-9 else "0" for _, part in kl.by_channel()),
            f"{kl.kl_p99:.2g}" if kl.kl_p99 > 1e-9 else "0",
            f"{kl.top1_agreement:.2%}",
            "" if result.replies is None else "{} of {}".format(*result.replies),
        ]
        print("|", " | ".join(cells), "|", flush=True)
