"""The result of a run: the joined model with its card, the adapter, the plot, the report."""

from collections.abc import Mapping
from pathlib import Path

from torch import Tensor
from transformers import PreTrainedModel, TokenizersBackend

from fedsplit import atomic
from fedsplit.data import Corpus, layout_of
from fedsplit.model import SplitModel
from fedsplit.model.join import folded_model, join_model
from fedsplit.model.lora import save_adapter
from fedsplit.runs.folder import RunFolder
from fedsplit.runs.loss_plot import plot_losses
from fedsplit.runs.model_card import model_card
from fedsplit.runs.report import write_report
from fedsplit.runs.sample import sample_of
from fedsplit.runs.sealed_result import write_sealed
from fedsplit.spec import RunSpec


def write_result(
    folder: RunFolder,
    result: SplitModel | PreTrainedModel,
    tokenizer: TokenizersBackend | None,
    corpus: Corpus,
    run: RunSpec,
    ended: str = "",
    sealed: Mapping[str, Tensor] | None = None,
) -> None:
    """Write the result of a run into its folder.

    Args:
        folder: The run's folder.
        result: The trained model; adapters are merged into `model/`, and also saved in `adapter/`.
        tokenizer: Saved with the model if there is one.
        corpus: The corpus of all clients together, for the model card.
        run: The settings.
        ended: Why training ended early, if it diverged.
        sealed: The sealed client weights, which the server cannot join with the trunk.

    Raises:
        StorageError: A file cannot be written; the run is not finished.
    """
    plot_losses(folder)
    if run.lora.enabled and isinstance(result, SplitModel) and sealed is None:
        with atomic.new_folder(folder.adapter) as adapter:
            save_adapter(result.client, result.trunk, adapter)
    trunk = result.trunk if isinstance(result, SplitModel) else result
    attention = trunk.config._attn_implementation or ""
    cut = _cut(result) if isinstance(result, SplitModel) else "not split"
    layout = layout_of(corpus, tokenizer, run.data) if tokenizer else "none, but images"
    card = model_card(run, cut, attention, corpus, layout, folder.rounds(), ended)
    if isinstance(result, SplitModel) and sealed is not None:
        with atomic.new_folder(folder.model) as model:
            write_sealed(model, result.trunk, sealed)
            _write_texts(model, tokenizer, card)
            write_report(folder, is_over=True)
        return
    if isinstance(result, SplitModel):
        whole = join_model(result.client, result.trunk)
    else:
        whole = folded_model(result)
    # Last, since a run with this folder is finished and is not resumed.
    with atomic.new_folder(folder.model) as model:
        whole.save_pretrained(model)
        _write_texts(model, tokenizer, card)
        if tokenizer and _is_trained(run) and whole.can_generate():
            sample = sample_of(whole, tokenizer, run.data.sequence_length)
            if sample is not None:
                atomic.write_text(folder.sample, f"{sample}\n")
        write_report(folder, is_over=True)


def _write_texts(model: Path, tokenizer: TokenizersBackend | None, card: str) -> None:
    if tokenizer:
        tokenizer.save_pretrained(model)
    (model / "README.md").write_text(card, encoding="utf-8")


def _is_trained(run: RunSpec) -> bool:
    """Whether the result has no part that stays untrained, because each client keeps its own."""
    return run.client_weights.personal == "none" and run.baseline != "local"


def _cut(result: SplitModel) -> str:
    """Return the numbers of blocks of bottom, trunk and top, as text."""
    blocks, num_blocks = result.client.trunk_blocks, result.client.plan.num_blocks
    return f"{blocks.start}/{len(blocks)}/{num_blocks - blocks.stop}"
