"""A finished run as its server sees it: what the server knows, and the private text to score by.

Shapes: B sequences, T tokens, D hidden width.
"""

from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel

from fedsplit.data import (
    Corpus,
    hold_out,
    load_corpus,
    load_tokenizer,
    tokenize,
)
from fedsplit.data.batches import whole_rows
from fedsplit.errors import ConfigError
from fedsplit.model import SplitModel, split_model
from fedsplit.model.trunkless import without_trunk
from fedsplit.runs.folder import RunFolder
from fedsplit.spec import DataSpec, ModelSpec, RunSpec, SplitSpec

_PUBLIC_SEQUENCES = 256


@dataclass(frozen=True, slots=True, kw_only=True)
class Scene:
    """What an honest but curious server knows of a run, and the text that it should not read.

    Attributes:
        run: The run.
        whole: The trained model: the server has the trunk, and averages the rest.
        private_BT: Token ids that clients could train on: held-out text of the run.
        public_BT: Token ids of public text.
    """

    run: RunSpec
    whole: PreTrainedModel
    private_BT: Tensor
    public_BT: Tensor

    @staticmethod
    def of_run(folder: RunFolder, sequences: int, tokens: int, public: str = "") -> "Scene":
        """Return the scene of a finished run.

        Args:
            folder: The run's folder.
            sequences: The number of private sequences.
            tokens: The length of each, at most that of the run.
            public: A file of public text; by default the text that the run trained on, since what
                is private here is held out.

        Raises:
            ConfigError: The run is a baseline, or no language model.
            DataError: The folder is not that of a finished run, or there is too little text.
        """
        run = folder.run
        if run.task != "causal_lm" or run.baseline != "none":
            raise ConfigError(
                f"{folder.path} is a run of task={run.task} and baseline={run.baseline}; the audit "
                "reads split language models"
            )
        model = RunFolder.finished(folder.path).model
        training, held_out = hold_out(load_corpus(run.data), run.data.held_out, run.seed)
        if public:
            training = _text(run, public)
        tokens = min(tokens, run.data.sequence_length)
        return Scene._of(run, str(model), sequences, tokens, private=held_out, public=training)

    @staticmethod
    def of_model(
        model: str, split: str, sequences: int, tokens: int, *, private: str, public: str
    ) -> "Scene":
        """Return the scene of a model that a run would train.

        Args:
            model: The directory of a model, or its hub id.
            split: The blocks of bottom, trunk and top.
            sequences: The number of private sequences.
            tokens: The length of each.
            private: A file of text that the server should not read.
            public: A file of text that it knows.

        Raises:
            ConfigError: The model cannot be split so.
            DataError: There is too little text.
        """
        run = RunSpec(
            model=ModelSpec(pretrained=model, family="", config={}),
            split=SplitSpec.parse(split),
            data=DataSpec(kind="text", path=private, sequence_length=tokens),
        )
        texts = {"private": _text(run, private), "public": _text(run, public)}
        return Scene._of(run, model, sequences, tokens, **texts)

    @staticmethod
    def _of(
        run: RunSpec, model: str, sequences: int, tokens: int, *, private: Corpus, public: Corpus
    ) -> "Scene":
        tokenizer = load_tokenizer(model)

        def rows_of(corpus: Corpus, number: int) -> Tensor:
            examples = tokenize(corpus, tokenizer, run.data)
            return whole_rows(examples, corpus.name, number, tokens)

        whole: PreTrainedModel = AutoModelForCausalLM.from_pretrained(
            model, trust_remote_code=False, dtype="auto", attn_implementation="eager"
        )
        return Scene(
            run=run,
            whole=whole.eval(),
            private_BT=rows_of(private, sequences),
            public_BT=rows_of(public, _PUBLIC_SEQUENCES),
        )

    def parts(self, more_blocks: int = 0) -> SplitModel:
        """Return the parts; the bottom may have more blocks than in the run."""
        return split_model(self.whole, self.split(more_blocks), attn_implementation="eager")

    def split(self, more_blocks: int = 0) -> SplitSpec:
        """Return the cut of the run, or one with a deeper bottom."""
        return replace(self.run.split, bottom=self.run.split.bottom + more_blocks)

    @property
    def trunk_blocks(self) -> int:
        """The number of blocks of the trunk."""
        return len(self.parts().client.trunk_blocks)

    def ends(self, more_blocks: int = 0) -> PreTrainedModel:
        """Return the client's blocks as an ordinary model, as the server knows them."""
        ends = without_trunk(self.parts(more_blocks).client, attn_implementation="eager")
        ends.eval()
        return ends

    @property
    def is_tied(self) -> bool:
        """Whether the head has the weights of the embedding."""
        embedding, head = self.whole.get_input_embeddings(), self.whole.get_output_embeddings()
        return getattr(embedding, "weight", None) is getattr(head, "weight", 0)

    @property
    def most_frequent(self) -> float:
        """The share of the most frequent private token: what a constant guess gets right."""
        return float(torch.bincount(self.private_BT.flatten()).max()) / self.private_BT.numel()

    @property
    def others_BT(self) -> Tensor:
        """Public text of the shape of the private one, for a control."""
        return self.public_BT[: len(self.private_BT)]


def _text(run: RunSpec, file: str) -> Corpus:
    return load_corpus(replace(run.data, kind="text", path=str(Path(file).resolve())))


def share_equal(guessed_BT: Tensor, true_BT: Tensor) -> float:
    """Return the share of the tokens that were guessed."""
    return float((guessed_BT == true_BT).float().mean())
