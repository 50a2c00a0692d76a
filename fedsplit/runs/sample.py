"""The sample of a run: the beginning of a text, as the trained language model writes it."""

import logging

import torch
from transformers import PreTrainedModel, TokenizersBackend

log = logging.getLogger(__name__)

SAMPLE_TOKENS = 24
# Each token reads all weights; a larger model would keep a CPU busy for minutes.
MAX_PARAMETERS = 1_000_000_000


def sample_of(model: PreTrainedModel, tokenizer: TokenizersBackend, max_tokens: int) -> str | None:
    """Return tokens that are drawn from the model at the beginning of a text.

    It begins with a special token and not with words of a corpus, since logs show the sample. The
    seed is always the same, so the same weights give the same sample. The text does not end before
    its last token, since an early model often ends a text at once.

    Args:
        model: The unsplit language model; it is left in evaluation mode.
        tokenizer: The model's tokenizer, with an end-of-text token.
        max_tokens: Limits the length, for a model with few positions.

    Returns:
        The text in one line; None if the model is large, or cannot write one on this machine.
    """
    if model.num_parameters() > MAX_PARAMETERS:
        return None
    begin = tokenizer.eos_token_id if tokenizer.bos_token_id is None else tokenizer.bos_token_id
    ids_BT = torch.tensor([[begin]], device=model.device)
    generator = torch.Generator().manual_seed(0)
    model.eval()
    try:
        with torch.no_grad():
            for _ in range(min(SAMPLE_TOKENS, max_tokens - 1)):
                # Without `generate`, whose options the model's author chose for other purposes.
                logits_BTV = model(input_ids=ids_BT, use_cache=False).logits
                logits_BTV[..., tokenizer.eos_token_id] = float("-inf")
                shares_BV = logits_BTV[:, -1].float().softmax(dim=-1).cpu()
                next_B1 = torch.multinomial(shares_BV, 1, generator=generator)
                ids_BT = torch.cat((ids_BT, next_B1.to(ids_BT.device)), dim=1)
    # The model may have been trained on another device, with kernels that this one lacks.
    except (RuntimeError, ValueError, TypeError, LookupError, ImportError) as exc:
        log.warning("the trained model writes no sample: %s", exc)
        return None
    text = " ".join(str(tokenizer.decode(ids_BT[0, 1:], skip_special_tokens=True)).split())
    # A terminal would obey control characters.
    return "".join(each if each.isprintable() else "\N{REPLACEMENT CHARACTER}" for each in text)
