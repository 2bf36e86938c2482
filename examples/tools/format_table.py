"""Print what each format costs in quality: a checkpoint in every format against its bfloat16 conversion, as Markdown.

    python examples/tools/format_table.py [--model PATH] [--exact N] [FORMAT ...]     default: every writable format

--exact N adds the exact match of the bundled model's held-out questions, N of each kind."""

import argparse
import tempfile
from pathlib import Path

from measure_nano import measure

import mlx_gptoss
from mlx_gptoss.api import NANO
from mlx_gptoss.weights.formats import WRITERS

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("formats", nargs="*", metavar="FORMAT")
parser.add_argument("--model", default=NANO, type=Path)
parser.add_argument("--exact", type=int, default=0, metavar="N")
options = parser.parse_args()
names = ["bf16", *(name for name in options.formats or WRITERS if name != "bf16")]
with tempfile.TemporaryDirectory() as folder:
    paths = {name: Path(folder) / name for name in names}
    for name, path in paths.items():
        mlx_gptoss.convert(options.model, path, to=name)
    print(
        "| format | size | bits per weight | perplexity | KL mean | KL p99 | top-1 |", "exact |" * bool(options.exact)
    )
    print("|---|" + "---:|" * (6 + bool(options.exact)))
    for found in mlx_gptoss.evaluate(*paths.values(), against=paths["bf16"]):
        kl, exact = found.against[0], ""
        if options.exact:
            with mlx_gptoss.load(found.model) as model:
                counts = measure(model, options.exact).values()
            exact = f" {sum(good for good, _ in counts) / sum(asked for _, asked in counts):.1%} |"
        print(
            f"| `{Path(found.model).name}` | {found.size_bytes / 1e6:.2f} MB | {found.bits_per_weight:.2f} "
            f"| {found.perplexity:.4f} | {kl.kl_mean:.1e} | {kl.kl_p99:.1e} | {kl.top1_agreement:.2%} |{exact}",
            flush=True,
        )
