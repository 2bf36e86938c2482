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


def kind_of(param):
    """The type of a tensor in the file; None is float32."""
    if not param.is_matrix or param.role == "router":
        return None
    return gguf.GGMLQuantizationType.MXFP4 if param.role == "experts" else gguf.GGMLQuantizationType.Q8_0


def values_of(param):
    """A tensor as it is in the file."""
    weight, kind = source.read(param.name), kind_of(param)
    if kind != gguf.GGMLQuantizationType.MXFP4:
        values = codecs.dequantize(weight)
        return values if kind is None else gguf.quants.quantize(values, kind)
    codes = weight.codes.reshape(*weight.scale.shape, 2, 8)  # elements 2 j and 2 j + 1 become j and j + 16
    low, high = codes[..., 0, :], codes[..., 1, :]
    blocks = np.empty((*weight.scale.shape, 17), np.uint8)
    blocks[..., 0] = weight.scale
    blocks[..., 1::2], blocks[..., 2::2] = low & 15 | high << 4, low >> 4 | high & 240
    return blocks.reshape(*param.shape[:2], -1)


for param in source.params:
    kind = kind_of(param)
    block, size = (1, 4) if kind is None else gguf.GGML_QUANT_SIZES[kind]
    shape = (*param.shape[:-1], param.shape[-1] // block * (1 if kind is None else size))
    dtype = np.dtype(np.float32 if kind is None else np.uint8)
    file.add_tensor_info(tensor_name(param), shape, dtype, int(np.prod(shape)) * dtype.itemsize, raw_dtype=kind)
for write in (file.write_header_to_file, file.write_kv_data_to_file, file.write_ti_data_to_file):
    write()
for param in source.params:  # one tensor in memory at a time
    file.write_tensor_data(values_of(param))
file.close()
