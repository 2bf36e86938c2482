"""Print, as JSON, the launches of requests that the warm-up has not compiled: `python after_warm_up.py FORMAT SLOTS`.

All on torch's meta device, which has shapes and no values; Triton's interpreter must be off.
"""

from __future__ import annotations

import json
import sys
from dataclasses import replace

import torch
from report import Launch, recording
from shapes import META, meta_model

from mlx_gptoss.backends.base import Limits
from mlx_gptoss.backends.cuda.cache import Cache, Span
from mlx_gptoss.backends.cuda.decode import Decoder
from mlx_gptoss.backends.cuda.kernels.fused import Fused
from mlx_gptoss.backends.cuda.runner import step_rows, warm_up
from mlx_gptoss.config import PRESETS

CONTEXT = 131072
PIECES = (  # (positions before, new tokens): prompts of any length, chunks of long ones, messages after a context
    *((0, length) for length in (2, 15, 16, 17, 31, 33, 63, 64, 65, 100, 127, 129, 255, 257, 1000, 1023, 4095, 4096)),
    *((start, length) for start in (1, 100, 4096, 4097, 20001, 100003) for length in (2, 3, 7, 15, 33, 64, 65, 300)),
)


@torch.inference_mode()
def missing(form: str, slots: int) -> dict[str, object]:
    """With keys and values as they are, and in 8 bits with drafts.

    launches: how many different ones the requests make. missing: those that would compile then."""
    config = PRESETS["20b"]
    config = replace(config, num_hidden_layers=2, layer_types=config.layer_types[:2], vocab_size=1024)
    model = meta_model(config, form)
    late, launches = set(), 0
    for pack, drafts in ((None, 0), (Fused().pack, 3)):
        cache = Cache(config, slots, CONTEXT, torch.bfloat16, META, whole=True, pack=pack, slack=drafts)
        decoder = Decoder(model, cache, torch.zeros(slots, dtype=torch.int64, device=META), CONTEXT)
        with recording() as before:
            decoder.compile(step_rows(Limits(slots, CONTEXT, 4096, drafts=drafts)))
            warm_up(model, cache)
        compiled = {kernel(launch) for launch in before}
        with recording() as after:
            for count in range(1, slots * (1 + drafts) + 1):
                decoder._run(decoder._ready(1 << (count - 1).bit_length()), ())
            for start, length in PIECES:
                ids = torch.zeros((1, length), dtype=torch.int64, device=META)
                model.logits(model(ids, cache, Span.of([slots - 1], [start], length, META))[:, -1])
        late |= {f"{launch.name} {dict(launch.constants)}" for launch in after if kernel(launch) not in compiled}
        launches += len(after)
    return {"launches": launches, "missing": sorted(late)}


def kernel(launch: Launch) -> Launch:
    """What is compiled: a launch without its grid."""
    return replace(launch, what="", programs=0)


if __name__ == "__main__":
    print(json.dumps(missing(sys.argv[1], int(sys.argv[2]))))
