"""The limits that a model sets to its data: numbers of tokens and classes, and positions.

A run checks them before it starts. Otherwise training fails in the middle of a round, at the first
document that reaches a limit.
"""

import copy
import logging
from typing import Any

from torch import nn
from transformers import PretrainedConfig, TokenizersBackend

from fedsplit.errors import ConfigError
from fedsplit.model.plan import model_class_for
from fedsplit.model.source import on_meta
from fedsplit.spec import RunSpec

log = logging.getLogger(__name__)

_POSITIONS = ("max_position_embeddings", "max_seq_len")
_SPECIAL = ("bos_token_id", "eos_token_id", "pad_token_id")


def require_rows(
    config: PretrainedConfig, tokenizer: TokenizersBackend | None, labels: tuple[str, ...]
) -> None:
    """Refuse tokens that the embedding has no row for, and classes that the head has no output for.

    Args:
        config: The unsplit model's config.
        tokenizer: The tokenizer of the data; None for images.
        labels: The classes of the data; `()` for a language model.

    Raises:
        ConfigError: There are too many; the text has both numbers.
    """
    if labels and config.num_labels is not None and config.num_labels < len(labels):
        raise ConfigError(
            f"the data has {len(labels)} classes, but the model's config has num_labels="
            f"{config.num_labels}; leave num_labels out of model.config"
        )
    if tokenizer is None:
        return
    text: Any = config.get_text_config(decoder=True)
    numbers = tokenizer.get_vocab()
    # Numbers may have gaps, so the largest one decides.
    last = max(numbers, key=numbers.__getitem__)
    if numbers[last] >= text.vocab_size:
        raise ConfigError(
            f"the tokenizer has {len(tokenizer)} tokens, the last one {last!r} with number "
            f"{numbers[last]}, but the model's embedding has {text.vocab_size} rows (vocab_size); "
            "use the tokenizer that the model was saved with, or save the model again after "
            f"resize_token_embeddings({numbers[last] + 1})"
        )
    for name in _SPECIAL:
        found = getattr(text, name, None)
        for number in found if isinstance(found, list) else [found]:
            # Old configs have -1 for a token that does not exist.
            if number is not None and number >= text.vocab_size:
                raise ConfigError(
                    f"the model's config has {name}={number}, but its embedding has "
                    f"{text.vocab_size} rows (vocab_size); correct {name} in the config"
                )


def require_positions(run: RunSpec, config: PretrainedConfig) -> None:
    """Refuse sequences that are longer than the model's table of positions.

    Rotary models compute positions of any number, so for them a longer sequence is only logged as
    a warning, as in transformers.

    Raises:
        ConfigError: The sequences are longer; the text has both numbers.
    """
    text: Any = config.get_text_config(decoder=True)
    setting = next((name for name in _POSITIONS if isinstance(getattr(text, name, None), int)), "")
    length, limit = run.data.sequence_length, getattr(text, setting, 0) if setting else 0
    if limit <= 0:
        return
    if getattr(text, "rope_parameters", None):
        if length > limit:
            log.warning(
                "data.sequence_length=%d is more than the %d positions (%s) that the model was "
                "made for; expect a higher loss after position %d",
                *(length, limit, setting, limit),
            )
        return
    # RoBERTa and others begin to count after the number of the padding token.
    if length > limit - 1 - (text.pad_token_id or 0):
        limit -= _first_position(run, config)
    if length > limit:
        raise ConfigError(
            f"data.sequence_length={length}, but the model has {limit} positions ({setting}="
            f"{getattr(text, setting)}); set data.sequence_length={limit} or less"
        )


def _first_position(run: RunSpec, config: PretrainedConfig) -> int:
    """Return the number of rows before the first position in the table of positions."""
    model = on_meta(model_class_for(config, run.task), copy.deepcopy(config))
    return max(
        (
            table.padding_idx + 1
            for name, table in model.named_modules()
            if isinstance(table, nn.Embedding)
            and "position" in name.rpartition(".")[2]
            and table.padding_idx is not None
        ),
        default=0,
    )
