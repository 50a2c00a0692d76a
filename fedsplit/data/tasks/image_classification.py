"""Classification of images.

Shapes: N rows, P pixels of an image.
"""

import math

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerFast
from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING

from fedsplit.data.corpora import Corpus
from fedsplit.data.tasks.classification import Classification
from fedsplit.spec import DataSpec


class ImageClassification(Classification):
    """Prediction of the class of a square gray image."""

    name = "image_classification"
    pipeline = "image-classification"
    head = "image classification"
    model_classes = MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING
    reads_text = False

    def _inputs(
        self, corpus: Corpus, data: DataSpec, tokenizer: PreTrainedTokenizerFast | None
    ) -> dict[str, Tensor]:
        """Return images with values from -1 to 1, the range of Hugging Face's processors."""
        pixels_NP = torch.tensor([document.pixels for document in corpus.documents])
        side = math.isqrt(pixels_NP.shape[1])
        return {"pixel_values": pixels_NP.view(-1, 1, side, side) * 2 - 1}
