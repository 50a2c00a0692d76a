"""Classification of texts."""

from torch import Tensor
from transformers import PreTrainedTokenizerFast
from transformers.models.auto.modeling_auto import MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING

from fedsplit.data.corpora import Corpus
from fedsplit.data.encoding import special_token_options
from fedsplit.data.tasks.classification import Classification
from fedsplit.spec import DataSpec


class SequenceClassification(Classification):
    """Prediction of the class of a text."""

    name = "sequence_classification"
    pipeline = "text-classification"
    head = "sequence classification"
    model_classes = MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING
    reads_text = True

    def _inputs(
        self, corpus: Corpus, data: DataSpec, tokenizer: PreTrainedTokenizerFast | None
    ) -> dict[str, Tensor]:
        """Return texts, cut or padded at the right to `data.sequence_length` tokens.

        `data.special_tokens` says whether the tokenizer adds its own special tokens.
        """
        assert tokenizer is not None, "a task that reads text has a tokenizer"
        encoded = tokenizer(
            [document.text for document in corpus.documents],
            truncation=True,
            padding="max_length",
            max_length=data.sequence_length,
            # Positions count from the left, so padding at the left would shift them.
            padding_side="right",
            **special_token_options(data.special_tokens),
            return_token_type_ids=False,
            return_tensors="pt",
        )
        return {"input_ids": encoded["input_ids"], "attention_mask": encoded["attention_mask"]}
