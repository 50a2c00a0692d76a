"""The tokenizer of a run: training, loading, and its JSON form in messages.

Shapes: V vocabulary.
"""

import json
import re
from collections.abc import Callable, Iterator

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from torch import Tensor
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from fedsplit.data.corpora import Corpus
from fedsplit.data.hub import offline_reason, reporting_a_full_disk
from fedsplit.errors import DataError

END_OF_TEXT = "<|endoftext|>"
# The trainer's time grows with the square of a word's length.
LONGEST_WORD = 1000
SPECIAL_TOKENS = ("bos_token", "eos_token", "unk_token", "pad_token")


def train_tokenizer(
    corpus: Corpus, vocabulary: int, *, begins_texts: bool = False
) -> PreTrainedTokenizerFast:
    """Train a byte-level BPE, like that of GPT-2; the same corpus gives the same tokenizer.

    The token `<|endoftext|>` is the end of a document and also the padding; the attention mask
    tells them apart. A text to classify begins with it, since encoders classify by the first
    token. It does not end with it, since decoders classify by the last token before the padding.

    Args:
        corpus: The corpus to train on.
        vocabulary: Maximum number of tokens, at least 257; a small corpus may give fewer.
        begins_texts: Whether `<|endoftext|>` is added before each text, for classification.
    """
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        # The trainer reserves memory for all tokens, and a merge of two takes a byte of the corpus.
        vocab_size=min(vocabulary, 257 + corpus.num_bytes),
        special_tokens=[END_OF_TEXT],
        # alphabet() has no fixed order, and the order decides the numbers of tokens.
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    texts = (text for document in corpus.documents for text in without_long_words(document.text))
    tokenizer.train_from_iterator(texts, trainer)
    if begins_texts:
        tokenizer.post_processor = processors.TemplateProcessing(
            single=f"{END_OF_TEXT} $A", special_tokens=[(END_OF_TEXT, 0)]
        )
    return _wrap(tokenizer, eos_token=END_OF_TEXT, pad_token=END_OF_TEXT)


def without_long_words(text: str) -> Iterator[str]:
    """Yield a text in pieces whose words have at most `LONGEST_WORD` characters."""
    start = 0
    # The kinds of words of the ByteLevel pre-tokenizer: letters, digits, white space, and others.
    for word in re.finditer(r"[^\W\d_]+|\d+|\s+|(?:[^\w\s]|_)+", text):
        for end in range(word.start() + LONGEST_WORD, word.end(), LONGEST_WORD):
            yield text[start:end]
            start = end
    yield text[start:]


def load_tokenizer(pretrained: str, revision: str = "main") -> PreTrainedTokenizerFast:
    """Load the tokenizer of a hub id or a local directory.

    If it has no padding token, the end-of-text token is used.

    Raises:
        DataError: There is no tokenizer, it has no JSON form, or it has no end-of-text token.
        CheckpointError: The name is neither a directory nor a hub id.
        ConnectionLost: The hub does not answer.
        StorageError: The disk of the hub's cache is full.
    """
    offline = offline_reason(pretrained, revision)
    try:
        with reporting_a_full_disk(pretrained):
            tokenizer = AutoTokenizer.from_pretrained(
                pretrained,
                revision=revision,
                trust_remote_code=False,
                local_files_only=bool(offline),
            )
    # transformers raises any of these for a tokenizer that is missing or damaged.
    except (OSError, ValueError, KeyError, ImportError, RecursionError) as exc:
        where = f" from the hub's cache, and {offline}" if offline else ""
        raise DataError(
            f"model.pretrained={pretrained} has no tokenizer to load{where}: {exc}"
        ) from exc
    except Exception as exc:
        # The tokenizers library, which is written in Rust, raises plain `Exception`.
        if type(exc) is Exception:
            raise DataError(
                f"the tokenizer.json of model.pretrained={pretrained} cannot be read ({exc}); it "
                "is damaged, or of a newer version: pip install -U tokenizers transformers"
            ) from exc
        raise
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
    """Return a tokenizer as JSON, for a message: its pipeline and its special tokens."""
    special = {name: getattr(tokenizer, name) for name in SPECIAL_TOKENS}
    return json.dumps({"pipeline": tokenizer.backend_tokenizer.to_str(), "special": special})


def tokenizer_from_json(text: str) -> PreTrainedTokenizerFast:
    """Return the tokenizer that `tokenizer_to_json` wrote.

    Raises:
        DataError: The text is not the output of `tokenizer_to_json`.
    """
    try:
        fields = json.loads(text)
        # No other keyword of the constructor, which also reads files.
        pipeline, special = fields["pipeline"], {k: fields["special"][k] for k in SPECIAL_TOKENS}
    except (ValueError, KeyError, TypeError, RecursionError) as exc:
        raise DataError(
            f"the message has no tokenizer of fedsplit: found {text[:40]!r}; "
            "run the same version of fedsplit at server and client"
        ) from exc
    return _wrap(Tokenizer.from_str(pipeline), **special)


def _wrap(pipeline: Tokenizer, **special: str) -> PreTrainedTokenizerFast:
    # The constructor has no annotations, which mypy does not let typed code call.
    make: Callable[..., PreTrainedTokenizerFast] = PreTrainedTokenizerFast
    return make(tokenizer_object=pipeline, **special)


def token_bytes(tokenizer: PreTrainedTokenizerFast) -> Tensor:
    """Return the number of UTF-8 bytes of text of each token; 0 for special tokens.

    The numbers are exact for byte-level BPE, whose tokens have one character per byte. For other
    tokenizers they are the bytes of the token's text, with a byte fallback (`<0x0A>`) as one byte
    and the SentencePiece mark as one space. Some tokenizers add that space at the beginning of a
    document, which then counts one byte too many.

    Returns:
        bytes_V: int64.
    """
    vocabulary = tokenizer.get_vocab()
    # As text, since ByteLevel may be one decoder of a sequence.
    is_byte_level = "ByteLevel" in str(tokenizer.backend_tokenizer.decoder)
    # Numbers of tokens may have gaps.
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
