"""Tiny configs of any causal language model family, small enough to run in a second."""

import copy
from typing import Any

from huggingface_hub.errors import StrictDataclassError
from transformers import CONFIG_MAPPING, PretrainedConfig

from fedsplit.errors import ConfigError, UnsupportedModel
from fedsplit.model.dryrun import FAMILY_ERRORS
from fedsplit.model.plan import model_class_for
from fedsplit.model.source import on_meta

MOST_PARAMETERS = 8_000_000
VOCABULARY = 99

# The names of sizes in the families' configs, by a small value for them. Windows are shorter than
# the tests' sequences, so that they have an effect. Numbers of heads and groups divide each other.
_SMALL: dict[int, str] = {
    VOCABULARY: "vocab_size vocab_size_per_layer_input",
    128: "max_position_embeddings n_positions n_ctx max_seq_len",
    64: "intermediate_size ffn_dim ffn_hidden_size n_inner encoder_ffn_dim decoder_ffn_dim",
    32: "hidden_size n_embd d_model embed_dim dim moe_intermediate_size lru_width conv_dim "
    "shared_expert_intermediate_size expert_ffn_hidden_size mamba_d_ssm",
    16: "q_lora_rank kv_lora_rank block_size",
    8: "head_dim attention_head_dim v_head_dim qk_nope_head_dim global_head_dim attention_window "
    "index_topk index_head_dim attention_chunk_size chunk_size linear_key_head_dim state_size "
    "linear_value_head_dim mamba_n_heads mamba_d_head mamba_d_state mamba_num_heads "
    "mamba_head_dim ssm_state_size",
    7: "sliding_window",
    4: "num_attention_heads n_head n_heads num_heads num_experts num_local_experts rotary_dim "
    "n_routed_experts moe_num_experts linear_num_value_heads qk_rope_head_dim time_step_rank "
    "mamba_dt_rank decoder_attention_heads encoder_attention_heads",
    3: "first_k_dense_replace",
    2: "num_key_value_heads num_kv_heads num_experts_per_tok moe_k linear_num_key_heads "
    "num_global_key_value_heads index_n_heads",
    1: "n_group topk_group n_shared_experts n_groups mamba_n_groups",
    0: "hidden_size_per_layer_input num_kv_shared_layers",
}
_TOKENS = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
_NUM_BLOCKS = ("num_hidden_layers", "decoder_layers", "encoder_layers")
# Latent attention has one key per query head.
_LATENT = {"num_key_value_heads": 4, "qk_rope_head_dim": 8}
_PER_BLOCK = ("layer_types", "mlp_layer_types", "layers_block_type", "no_rope_layers")
# What names do not tell. Kinds of blocks are repeated, so that every part has a block with
# attention, which counts the tokens of a cache.
_KINDS: dict[str, dict[str, list[str]]] = {
    "granitemoehybrid": {"layers_block_type": ["full_attention", "linear_attention"]},
    # The backward of linear attention takes long here without kernels.
    "kimi_linear": {"layer_types": ["full_attention", "linear_attention", *["full_attention"] * 4]},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"]},
    "nemotron_h": {"layers_block_type": ["full_attention", "linear_attention", "moe", "mlp"]},
}
_OF_TYPE: dict[str, dict[str, Any]] = {
    "cohere_compass_text": {
        "rope_parameters": {
            "full_attention": {
                "rope_type": "default",
                "rope_theta": 10_000.0,
                "mrope_section": [2, 1, 1],
            }
        }
    },
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 0},
}


def tiny_config(
    model_type: str, *, num_hidden_layers: int = 6, **overrides: Any
) -> PretrainedConfig:
    """Return a guessed config of a family, with a few thousand parameters.

    Args:
        model_type: A model type of transformers, such as "gpt2" or "llama".
        num_hidden_layers: The number of blocks, whatever its name in the family's config.
        overrides: Fields of the family's config that take precedence over the guess.

    Raises:
        ConfigError: The family is unknown, or no small config of it can be guessed.
    """
    if model_type not in CONFIG_MAPPING:
        raise ConfigError(f"family={model_type} is not a model type of transformers")
    config_class = CONFIG_MAPPING[model_type]
    try:
        usual = config_class()
        is_composite = usual.get_text_config(decoder=True) is not usual
        if is_composite and not usual.is_encoder_decoder:
            raise ConfigError(
                f"family={model_type} is made of several models; take its text model's type"
            )
        config: PretrainedConfig = config_class(**{**_guess(usual, num_hidden_layers), **overrides})
        # A trial on the meta device: many families check their sizes only when a model is built.
        whole = on_meta(model_class_for(config), copy.deepcopy(config))
    except UnsupportedModel as exc:
        raise ConfigError(str(exc)) from exc
    except ConfigError:
        raise
    except (*FAMILY_ERRORS, StrictDataclassError) as exc:
        text = " ".join(f"{type(exc).__name__}: {exc}".split())
        raise ConfigError(f"no tiny config of {model_type} by guess ({text[:120]})") from exc
    size = sum(p.numel() for p in whole.parameters())
    if size > MOST_PARAMETERS:
        raise ConfigError(f"the guessed config of {model_type} has {size} parameters, too many")
    return config


def _guess(usual: PretrainedConfig, num_blocks: int) -> dict[str, Any]:
    small = {name: value for value, names in _SMALL.items() for name in names.split()} | _TOKENS
    small |= dict.fromkeys(_NUM_BLOCKS, num_blocks)
    known = set(vars(usual)) | set(usual.attribute_map)
    guess: dict[str, Any] = {name: value for name, value in small.items() if name in known}
    if "kv_lora_rank" in guess:
        guess |= _LATENT
    for name in _PER_BLOCK:
        kinds = getattr(usual, name, None)
        if isinstance(kinds, (list, tuple)) and len(kinds) >= num_blocks:
            guess[name] = _shortened(list(kinds), num_blocks)
    for name, distinct in _KINDS.get(usual.model_type, {}).items():
        guess[name] = (distinct * num_blocks)[:num_blocks]
    guess |= _OF_TYPE.get(usual.model_type, {})
    return {name: value for name, value in guess.items() if _can_be_set(usual, name)}


def _shortened(kinds: list[Any], num_blocks: int) -> list[Any]:
    """Return the kinds of the first blocks; two kinds alternate, so that every part has both."""
    distinct = list(dict.fromkeys(kinds))
    return (distinct * num_blocks if len(distinct) == 2 else kinds)[:num_blocks]


def _can_be_set(usual: PretrainedConfig, name: str) -> bool:
    # Some configs compute a size in a property without a setter.
    attribute = getattr(type(usual), usual.attribute_map.get(name, name), None)
    return not (isinstance(attribute, property) and attribute.fset is None)
