"""The fields of config.json: which are read, which have no bearing on the logits, and which must be neutral.

They are those of transformers' GptOssConfig and its base class, of mlx-lm's ModelArgs, and those by which other
architectures change the numbers. The README of this folder has them with what is done about each.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ..config import ModelConfig
from ..errors import CheckpointError


def _names(text: str) -> frozenset[str]:
    return frozenset(text.split())


# Fields of other architectures that change the numbers, with the values that leave gpt-oss's as they are. null is
# always one of them.
NEUTRAL: Mapping[str, tuple[object, ...]] = {
    "add_cross_attention": (False,),
    "alibi": (False,),
    "attn_logit_softcapping": (0,),
    "chunk_size_feed_forward": (0,),
    "decoder_sparse_step": (1,),
    "embedding_multiplier": (1,),
    "final_logit_softcapping": (0,),
    "first_k_dense_replace": (0,),
    "hidden_act": ("silu",),
    "hidden_activation": ("silu",),
    "is_encoder_decoder": (False,),
    "logit_scale": (1,),
    "logits_scaling": (1,),
    "mlp_only_layers": ([],),
    "moe_layer_freq": (1,),
    "n_group": (1,),
    "n_shared_experts": (0,),
    "norm_topk_prob": (True,),
    "num_nextn_predict_layers": (0,),
    "num_shared_experts": (0,),
    "partial_rotary_factor": (1,),
    "position_embedding_type": ("rope", "absolute"),  # the latter is the default that transformers 4 wrote
    "pruned_heads": ({},),
    "qk_norm": (False,),
    "residual_multiplier": (1,),
    "rope_interleaved": (False,),
    "routed_scaling_factor": (1,),
    "scoring_func": ("softmax",),
    "shared_expert_intermediate_size": (0,),
    "topk_group": (1,),
    "use_qk_norm": (False,),
    "use_sliding_window": (True,),
}
# Fields that are read, here or by a format.
READ = _names(
    "attention_bias attention_multiplier block_configs eos_token_id experts_per_token head_dim hidden_size "
    "initial_context_length intermediate_size layer_types max_position_embeddings model_type moe_intermediate_size "
    "num_attention_heads num_experts num_experts_per_tok num_hidden_layers num_key_value_heads num_local_experts "
    "pad_token_id quantization quantization_config query_pre_attn_scalar rms_norm_eps rope_ntk_alpha rope_ntk_beta "
    "rope_parameters rope_scaling rope_scaling_factor rope_theta sliding_window swiglu_alpha swiglu_limit "
    "tie_word_embeddings vocab_size yarn_rope_scaling"
)
# Fields without a bearing on the logits: training, generation, bookkeeping.
UNUSED = _names(
    "_attn_implementation_autoset _name_or_path architectures attention_dropout auto_map bad_words_ids "
    "begin_suppress_tokens bos_token_id cross_attention_hidden_size decoder_start_token_id diversity_penalty "
    "do_sample dtype early_stopping encoder_no_repeat_ngram_size exponential_decay_length_penalty finetuning_task "
    "forced_bos_token_id forced_eos_token_id id2label initializer_range is_decoder label2id length_penalty max_length "
    "max_window_layers min_length no_repeat_ngram_size num_beam_groups num_beams num_return_sequences "
    "output_attentions output_hidden_states output_router_logits output_scores prefix pretraining_tp problem_type "
    "remove_invalid_values repetition_penalty return_dict return_dict_in_generate router_aux_loss_coef sep_token_id "
    "suppress_tokens task_specific_params temperature tf_legacy_loss tokenizer_class top_k top_p torch_dtype "
    "torchscript transformers.js_config transformers_version typical_p unsloth_fixed unsloth_version use_bfloat16 "
    "use_cache"
)


def refuse_what_changes_numbers(data: Mapping[str, Any], config: ModelConfig) -> None:
    """Raise CheckpointError for a field that would change the numbers and is not honoured."""
    same = {
        "moe_intermediate_size": config.intermediate_size,
        "query_pre_attn_scalar": config.head_dim,
        "attention_multiplier": config.head_dim**-0.5,
    }
    for name in (*NEUTRAL, *same):
        value = data.get(name)
        if value is None or value in NEUTRAL.get(name, ()) or (name in same and value == same[name]):
            continue
        raise CheckpointError(
            f"config.json: {name} is {repr(value)[:80]}, which changes the model's numbers and is not supported: "
            "this is not a gpt-oss model, or its config.json was edited"
        )


def unknown_fields(data: Mapping[str, Any]) -> list[str]:
    """The names of fields of which nothing is known here, unless they are empty, 0 or 1."""
    return sorted(k for k in set(data) - READ - UNUSED - set(NEUTRAL) if data[k] not in (None, 0, 1, "", [], {}))
