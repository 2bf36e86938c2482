"""Write synthetic weights as a GGUF file without a vocabulary, for llama.cpp: experts in MXFP4, the rest in Q8_0.

python examples/tools/write_gguf.py 20b|120b|tiny LAYERS FILE.gguf
"""

import sys

import numpy as np
from requires import gguf

from mlx_gptoss.weights import codecs
from mlx_gptoss.weights.formats.gguf import tensor_name
from mlx_gptoss.weights.synthetic import Synthetic, preset

source = Synthetic(preset(sys.argv[1], int(sys.argv[2])), "mxfp4")
c, file = source.config, gguf.GGUFWriter(sys.argv[3], "gpt-oss")
for key, value in {
    "block_count": c.num_hidden_layers, "context_length": c.max_position_embeddings, "embedding_length": c.hidden_size,
    "feed_forward_length": c.intermediate_size, "expert_feed_forward_length": c.intermediate_size,
    "expert_count": c.num_local_experts, "expert_used_count": c.num_experts_per_tok, "vocab_size": c.vocab_size,
    "attention.head_count": c.num_attention_heads, "attention.head_count_kv": c.num_key_value_heads,
    "attention.key_length": c.head_dim, "attention.value_length": c.head_dim,
    "attention.sliding_window": c.sliding_window, "rope.scaling.original_context_length": c.yarn.original_context,
}.items():  # fmt: skip
    file.add_uint32(f"gpt-oss.{key}", value)
file.add_layer_norm_rms_eps(c.rms_norm_eps)
file.add_rope_freq_base(c.yarn.theta)
file.add_rope_scaling_factor(c.yarn.factor)
file.add_rope_scaling_type(gguf.RopeScalingType.YARN)
file.add_tokenizer_model("no_vocab")
for param in source.params:
    weight, values, kind = source.read(param.name), None, None
    if param.is_matrix and param.role == "experts":
        nibbles = codecs.unpack(weight.codes, 4).reshape(*weight.scale.shape, 2, 16)  # byte j: elements j and j + 16
        blocks = [weight.scale[..., None], nibbles[..., 0, :] | nibbles[..., 1, :] << 4]
        values, kind = np.concatenate(blocks, -1).reshape(*param.shape[:2], -1), gguf.GGMLQuantizationType.MXFP4
    elif param.is_matrix and param.role != "router":
        kind = gguf.GGMLQuantizationType.Q8_0
        values = gguf.quants.quantize(codecs.dequantize(weight), kind)
    file.add_tensor(tensor_name(param), codecs.dequantize(weight) if values is None else values, raw_dtype=kind)
for write in (file.write_header_to_file, file.write_kv_data_to_file, file.write_tensors_to_file, file.close):
    write()
