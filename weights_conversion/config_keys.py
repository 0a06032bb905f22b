"""Keys of a `config.json` without an effect on a forward without dropout."""

from __future__ import annotations

import re
from typing import Any

GENERIC = frozenset(
    """
    _attn_implementation _attn_implementation_autoset _attn_implementation_internal _commit_hash
    _experts_implementation _flash_attn_2_enabled _name_or_path architectures attention_dropout
    attn_implementation cache_implementation chunk_size_feed_forward decoder_start_token_id dtype
    experts_implementation finetuning_task id2label initializer_range is_decoder label2id
    output_attentions output_hidden_states prefix problem_type return_dict sep_token_id
    task_specific_params tf_legacy_loss tokenizer_class torch_dtype torchscript
    transformers_version use_bfloat16 use_cache
    """.split()
)
"""Settings that transformers 4 and 5 write into any config, with any value."""

GENERATION_DEFAULTS: dict[str, Any] = {
    "bad_words_ids": None,
    "begin_suppress_tokens": None,
    "diversity_penalty": 0.0,
    "do_sample": False,
    "early_stopping": False,
    "encoder_no_repeat_ngram_size": 0,
    "exponential_decay_length_penalty": None,
    "forced_bos_token_id": None,
    "forced_eos_token_id": None,
    "length_penalty": 1.0,
    "max_length": 20,
    "min_length": 0,
    "no_repeat_ngram_size": 0,
    "num_beam_groups": 1,
    "num_beams": 1,
    "num_return_sequences": 1,
    "output_scores": False,
    "remove_invalid_values": False,
    "repetition_penalty": 1.0,
    "return_dict_in_generate": False,
    "suppress_tokens": None,
    "temperature": 1.0,
    "top_k": 50,
    "top_p": 1.0,
    "typical_p": 1.0,
}
"""Settings of `generate` that transformers 4 writes into every config, with its defaults."""

WITHOUT_EFFECT_AT: dict[str, tuple[Any, ...]] = {
    "add_cross_attention": (False,),
    "cross_attention_hidden_size": (),
    "is_encoder_decoder": (False,),
    "pretraining_tp": (1,),
    "pruned_heads": ({}, []),
    "tie_encoder_decoder": (False,),
}
"""Settings of any transformers config that have an effect unless they have these values or null."""

LISTED = frozenset(
    """
    _unsloth_fixed attn_implementation_autoset auto_map base_model_name_or_path bos_token
    bos_token_ids eos_token eos_token_ids fuse_cross_entropy fuse_norm fuse_swiglu
    gradient_checkpointing image_token_id initializer_factor keys_to_ignore_at_inference license
    mask_token_id model_max_length model_name model_name_or_path n_ctx n_positions pad_token
    pad_to_multiple_of padding_side seed summary_activation
    summary_first_dropout summary_proj_to_labels summary_type summary_use_proj trust_remote_code
    unk_token_id unsloth_fixed use_cache_quantization use_flash_attention use_flash_attn
    use_liger_kernel vocab_file
    """.split()
)
"""Settings of other programs or old versions that no forward reads."""

LISTED_PATTERNS = re.compile(
    r"_?(unsloth|axolotl|llamafactory|trl|wandb|mlflow|tokenizer|training|dataset)_\w+"
    r"|(accelerate|deepspeed|peft|torch|vllm)_version"
    r"|\w*_(dropout|pdrop|commit_hash|url|author|created_at)"
    r"|(version|dropout|loss_type|\w+_loss_coef|\w+_loss_weight)"
)
"""Such settings by the form of their names: of the program, of dropout, of loss weights."""


def is_without_effect(key: str, value: Any) -> bool:
    """Whether transformers writes a setting for any model, and its value is without effect."""
    if key in GENERIC or (value is None and key in WITHOUT_EFFECT_AT):
        return True
    if key in GENERATION_DEFAULTS:
        return value is None or value == GENERATION_DEFAULTS[key]
    return any(value == harmless for harmless in WITHOUT_EFFECT_AT.get(key, ()))


def is_listed(key: str, value: Any) -> bool:
    """Whether a setting that the family does not read cannot affect a forward.

    A null counts as absent.
    """
    if key in WITHOUT_EFFECT_AT:
        return False
    known = key in LISTED or key in GENERATION_DEFAULTS or LISTED_PATTERNS.fullmatch(key)
    return value is None or bool(known)
