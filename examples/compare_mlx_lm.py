"""Load, prefill and decode of one checkpoint, here or in mlx-lm: run it once for each and compare.

python examples/compare_mlx_lm.py CHECKPOINT ours|mlx-lm|mlx-lm-float32
"""

import sys
import time
from pathlib import Path

import numpy as np

PROMPT, DECODED = 16, 4
path, engine = Path(sys.argv[1]), sys.argv[2]
started = time.perf_counter()
if engine == "ours":
    import mlx_gptoss

    with mlx_gptoss.load(path, max_context=4096) as model:
        print(f"load {time.perf_counter() - started:.1f} s")
        ids = np.random.default_rng(0).integers(0, model.config.vocab_size, PROMPT).tolist()
        done = model.complete(ids, max_tokens=DECODED + 1, sampling=mlx_gptoss.Sampling(temperature=0)).timings
    print(f"prefill {done.prefill_tok_s:.2f} tok/s, decode {done.decode_tok_s:.2f} tok/s")
else:
    import mlx.core as mx
    from mlx_lm.models.cache import make_prompt_cache
    from mlx_lm.utils import load_model

    model, config = load_model(path)
    if engine == "mlx-lm-float32":
        model.set_dtype(mx.float32)
    print(f"load {time.perf_counter() - started:.1f} s")
    cache = make_prompt_cache(model)
    tokens = mx.array(np.random.default_rng(0).integers(0, config["vocab_size"], (1, PROMPT)))
    for name, steps, count in (("prefill", 1, PROMPT), ("decode", DECODED, DECODED)):
        began = time.perf_counter()
        for _ in range(steps):
            tokens = mx.argmax(model(tokens, cache=cache)[:, -1:], axis=-1)
            mx.eval(tokens)
        print(f"{name} {count / (time.perf_counter() - began):.2f} tok/s")
