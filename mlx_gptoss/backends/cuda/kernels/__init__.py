"""The Triton kernels of the cuda backend.

| file            | kernels in it                                                           | launched by          |
|-----------------|-------------------------------------------------------------------------|----------------------|
| linear.py       | `_linear_kernel`: a product with a stored matrix                        | decode.py, fused.py  |
|                 | `_embed_kernel`                                                         | decode.py            |
| norm.py         | `_rms_norm_kernel`: RMSNorm, after adding up a product with split K     | decode.py            |
| qkv.py          | `_qkv_kernel`: project, rotate and write q, keys and values             | decode.py            |
|                 | `_rope_kernel`: rotate alone                                            | fused.py             |
| attention.py    | `_decode_kernel`, `_merge_splits_kernel`: one new token a row           | decode.py, fused.py  |
|                 | `_prefill_kernel`: many new tokens of one sequence                      | fused.py             |
| quantized_kv.py | `_quantize_kernel`: keys and values to 8 bits                           | decode.py, fused.py  |
|                 | `_dequantize_kernel`: and back, for a prompt                            | fused.py             |
| routing.py      | `_router_kernel`: scores of the experts                                 | decode.py            |
|                 | `_sort_pairs_kernel`: pairs of token and expert, sorted by expert       | decode.py            |
| moe.py          | `_gate_up_one_token_kernel`, `_down_one_token_kernel`                   | decode.py            |
|                 | `_gate_up_grouped_kernel`, `_down_grouped_kernel`,                      | decode.py, fused.py  |
|                 | `_sum_experts_kernel`: several tokens, grouped by expert                |                      |
| lora.py         | `_expert_factor_kernel`: an adapter's thin products with experts        | moe.py               |
| sample.py       | `_draw_blocks_kernel`, `_draw_rows_kernel`: sample a token for each row | decode.py            |

The other files have no kernels. dequant.py: device functions that decode weights, from matrices as ../matrices.py packs
them. swiglu.py: those of gate and up projections. tiles.py: the tile of every product.
interpreter.py: arithmetic that Triton's interpreter gets wrong. launch.py: the function that starts every kernel.
fused.py: the Operations of a prefill (layers.py), which call the launching functions above.

A kernel's name ends in `_kernel`; other `@triton.jit` functions are device functions, called by kernels. The Python
function after a kernel launches it. Arguments in capitals are compile-time constants.

To add a kernel: write it and its launching function in the file it belongs to, with the shapes and dtypes of its
arguments in the docstring. Start it through `launch`, take its tile from tiles.py, and use the functions of
interpreter.py for `tl.dot` and for bfloat16 arithmetic. Test it against float64 in tests/kernels/, which runs it in
Triton's interpreter. Add its name to EXPECTED in tests/kernels/test_compile.py, which compiles every kernel that a
model launches.
"""
