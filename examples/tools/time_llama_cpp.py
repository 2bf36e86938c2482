"""Time llama.cpp's prefill and decode on the CPU: python examples/tools/time_llama_cpp.py FILE.gguf"""

import os
import sys
import time

import numpy as np
from requires import llama_cpp as llama

prompt, generate = 512, 16
llama.llama_backend_init()
model = llama.llama_model_load_from_file(sys.argv[1].encode(), llama.llama_model_default_params())
vocab = llama.llama_vocab_n_tokens(llama.llama_model_get_vocab(model))
options = llama.llama_context_default_params()
options.n_ctx, options.n_batch, options.n_ubatch = prompt + generate + 8, prompt, min(prompt, 512)
options.n_threads = options.n_threads_batch = os.cpu_count()
context = llama.llama_init_from_model(model, options)
batch = llama.llama_batch_init(prompt, 0, 1)


def feed(ids, start):
    """Feed tokens at positions from `start`; return the likeliest next token."""
    batch.n_tokens = len(ids)
    for i, token in enumerate(ids):
        batch.token[i], batch.pos[i], batch.n_seq_id[i], batch.logits[i] = token, start + i, 1, i == len(ids) - 1
        batch.seq_id[i][0] = 0
    assert llama.llama_decode(context, batch) == 0
    return int(np.ctypeslib.as_array(llama.llama_get_logits_ith(context, len(ids) - 1), (vocab,)).argmax())


for turn in range(3):
    llama.llama_memory_clear(llama.llama_get_memory(context), True)
    ids = np.random.default_rng(turn).integers(0, vocab, prompt).tolist()
    began = time.perf_counter()
    token = feed(ids, 0)
    fed = time.perf_counter()
    for step in range(generate):
        token = feed([token], prompt + step)
    done = time.perf_counter()
    print(f"prefill {prompt / (fed - began):.1f} tok/s, decode {generate / (done - fed):.1f} tok/s")
