"""The chat template of a tokenizer: the text of a conversation, and the tokens that end a turn."""

from collections.abc import Sequence
from typing import Any

from jinja2 import TemplateError
from transformers import PretrainedConfig, PreTrainedTokenizerFast

from fedsplit.errors import ConfigError

_REPLY = "fedsplit-reply"
"""The reply of an example conversation, after which a template writes its end of a turn."""

Messages = Sequence[dict[str, Any]]
"""The turns of a conversation, each with its `role` and `content`."""


def conversation_text(tokenizer: PreTrainedTokenizerFast, messages: Messages) -> str:
    """Return the text that the model continues with the assistant's next turn.

    Raises:
        ConfigError: The template refuses the conversation.
    """
    return _rendered(tokenizer, messages, add_generation_prompt=True)


def end_tokens(
    tokenizer: PreTrainedTokenizerFast, generation_config: Any, *, chat: bool
) -> tuple[int, ...]:
    """Return the tokens that end a text: those at which `generate` of transformers stops.

    A chat also ends at the tokenizer's end-of-text token, and at the one that the chat template
    writes after a turn, such as `<|im_end|>`. Some models do not name it in their
    generation_config.json.

    Args:
        tokenizer: The model's tokenizer.
        generation_config: The `GenerationConfig` of the model.
        chat: Whether the text is a turn of a conversation.
    """
    named = generation_config.eos_token_id
    ends = list(named) if isinstance(named, list | tuple) else [named] if named is not None else []
    if chat or not ends:
        ends.append(tokenizer.eos_token_id)
    if chat and tokenizer.chat_template:
        ends += _end_of_turn(tokenizer)
    return tuple(sorted(set(ends)))


def positions_of(config: PretrainedConfig) -> int:
    """Return how many tokens the model has positions for; 0 if it does not say."""
    text: Any = config.get_text_config(decoder=True)
    return int(getattr(text, "max_position_embeddings", None) or 0)


def _end_of_turn(tokenizer: PreTrainedTokenizerFast) -> list[int]:
    """Return the special token that the template writes after a reply, or nothing."""
    example = [{"role": "user", "content": "a"}, {"role": "assistant", "content": _REPLY}]
    try:
        text = _rendered(tokenizer, example, add_generation_prompt=False)
    except ConfigError:  # a template for other roles
        return []
    after = text.rpartition(_REPLY)[2].lstrip()
    ids = tokenizer(after, add_special_tokens=False)["input_ids"][:1]
    return [each for each in ids if each in tokenizer.added_tokens_decoder]


def _rendered(
    tokenizer: PreTrainedTokenizerFast, messages: Messages, *, add_generation_prompt: bool
) -> str:
    try:
        text = tokenizer.apply_chat_template(
            list(messages), add_generation_prompt=add_generation_prompt, tokenize=False
        )
    # Templates are programs of the model's authors: they raise what Jinja raises, or fail.
    except (TemplateError, TypeError, ValueError) as exc:
        raise ConfigError(f"the model's chat template refuses this conversation: {exc}") from exc
    assert isinstance(text, str), "tokenize=False"
    return text
