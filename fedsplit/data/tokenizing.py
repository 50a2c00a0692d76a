"""The tokenizer of a run: how it is trained, loaded, and sent to clients.

Shapes: V vocabulary.
"""

import json
import re
from collections.abc import Callable

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from torch import Tensor
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from fedsplit.data.corpora import Corpus
from fedsplit.errors import DataError

END_OF_TEXT = "<|endoftext|>"
SPECIAL_TOKENS = ("bos_token", "eos_token", "unk_token", "pad_token")


def train_tokenizer(
    corpus: Corpus, vocabulary: int, *, begins_texts: bool = False
) -> PreTrainedTokenizerFast:
    """Train a byte-level BPE (as GPT-2's) on a corpus; the same corpus gives the same tokenizer.

    One token, `<|endoftext|>`, ends documents and pads; padding is known by the attention mask.
    A text to classify begins with it: encoders classify by their first token. Decoders classify
    by the last one that is not padding, so nothing follows the text.

    Args:
        corpus: What to train on.
        vocabulary: Most tokens, at least 257; a small corpus may give fewer.
        begins_texts: Whether `<|endoftext|>` is added before each text, for classification.
    """
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator((document.text for document in corpus.documents), trainer)
    if begins_texts:
        tokenizer.post_processor = processors.TemplateProcessing(
            single=f"{END_OF_TEXT} $A", special_tokens=[(END_OF_TEXT, 0)]
        )
    return _wrap(tokenizer, eos_token=END_OF_TEXT, pad_token=END_OF_TEXT)


def load_tokenizer(pretrained: str, revision: str = "main") -> PreTrainedTokenizerFast:
    """Load the tokenizer of a hub id or local directory; one without padding pads with its eos.

    Raises:
        DataError: There is none, it cannot travel as JSON, or it has no end-of-text token.
    """
    try:
        tokenizer = AutoTokenizer.from_pretrained(pretrained, revision=revision)
    except (OSError, ValueError, KeyError, ImportError) as exc:
        raise DataError(f"model.pretrained={pretrained} has no tokenizer to load: {exc}") from exc
    if not isinstance(tokenizer, PreTrainedTokenizerFast):
        raise DataError(
            f"the tokenizer of model.pretrained={pretrained} is a {type(tokenizer).__name__}; "
            "it must be one with a tokenizer.json"
        )
    if tokenizer.eos_token is None:
        raise DataError(
            f"the tokenizer of model.pretrained={pretrained} has no end-of-text token (eos_token); "
            "set one in its tokenizer_config.json"
        )
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def tokenizer_to_json(tokenizer: PreTrainedTokenizerFast) -> str:
    """A tokenizer as text, for a message: its pipeline and its special tokens."""
    special = {name: getattr(tokenizer, name) for name in SPECIAL_TOKENS}
    return json.dumps({"pipeline": tokenizer.backend_tokenizer.to_str(), "special": special})


def tokenizer_from_json(text: str) -> PreTrainedTokenizerFast:
    """The tokenizer that `tokenizer_to_json` wrote.

    Raises:
        DataError: It was not written by `tokenizer_to_json`.
    """
    try:
        told = json.loads(text)
        pipeline, special = told["pipeline"], dict(told["special"])
    except (ValueError, KeyError, TypeError) as exc:
        raise DataError(
            f"a tokenizer was expected, but this came: {text[:40]!r}; "
            "do server and client run the same version of fedsplit?"
        ) from exc
    return _wrap(Tokenizer.from_str(pipeline), **special)


def _wrap(pipeline: Tokenizer, **special: str) -> PreTrainedTokenizerFast:
    make: Callable[..., PreTrainedTokenizerFast] = PreTrainedTokenizerFast  # has no types itself
    return make(tokenizer_object=pipeline, **special)


def token_bytes(tokenizer: PreTrainedTokenizerFast) -> Tensor:
    """How many UTF-8 bytes of text each token stands for; none for special tokens.

    Exact for byte-level BPE, whose tokens spell each byte as one character. Of others a token's
    own text is counted, with byte fallbacks (`<0x0A>`) as one byte and the SentencePiece mark as
    the space it stands for: one byte too many per document where that space is made up.

    Returns:
        bytes_V: int64.
    """
    vocabulary = tokenizer.get_vocab()
    is_byte_level = "ByteLevel" in str(tokenizer.backend_tokenizer.decoder)
    bytes_V = torch.zeros(max(vocabulary.values()) + 1, dtype=torch.int64)
    for token, number in vocabulary.items():
        bytes_V[number] = len(token) if is_byte_level else _spelled_bytes(token)
    for number, added in tokenizer.added_tokens_decoder.items():
        bytes_V[number] = 0 if added.special else len(added.content.encode())
    return bytes_V


def _spelled_bytes(token: str) -> int:
    if re.fullmatch(r"<0x[0-9A-F]{2}>", token):
        return 1
    return len(token.replace("\u2581", " ").encode())
