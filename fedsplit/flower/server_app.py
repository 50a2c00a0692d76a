"""Flower's ServerApp: builds the model's parts, trains them with a strategy, records the run."""

import logging
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from flwr.app import Context
from flwr.serverapp import Grid, ServerApp
from flwr.serverapp.strategy import Strategy
from transformers import TokenizersBackend

from fedsplit.config import build, from_run_config
from fedsplit.console import quiet_libraries
from fedsplit.data import (
    TASKS,
    Corpus,
    hold_out,
    labels_of,
    layout_of,
    load_corpus,
    load_tokenizer,
    tokenizer_to_json,
    train_tokenizer,
)
from fedsplit.errors import Diverged
from fedsplit.flower.logs import show_logs
from fedsplit.flower.rank import command_of
from fedsplit.flower.records import WEIGHT
from fedsplit.flower.run_recorder import RunRecorder
from fedsplit.flower.strategy import SplitStrategy
from fedsplit.flower.strategy.noisy_mean import NoisyMean
from fedsplit.model.describe import config_of, parts_of, whole_of
from fedsplit.model.limits import require_positions, require_rows
from fedsplit.model.placement import devices_of, placed
from fedsplit.ranks.group import ranks_of
from fedsplit.runs.folder import RunFolder
from fedsplit.spec import RunSpec
from fedsplit.telemetry.context import working_on
from fedsplit.telemetry.sinks import Sink

log = logging.getLogger(__name__)


def app_with(*sinks: Sink) -> ServerApp:
    """Return the app; in this process, the events of its run go to these sinks as well.

    Two keys of the run config are for a program that starts the app again when its process is gone.
    With the same `run-id`, the app continues the run of this id, or ends at once if it is finished.
    It makes the file `end-mark` when it ends, so that a later end of its processes is no failure.
    """
    served = ServerApp()

    @served.main()
    def main(grid: Grid, context: Context) -> None:
        show_logs()
        quiet_libraries()
        run_id, end_mark = (str(context.run_config.get(key, "")) for key in ("run-id", "end-mark"))
        try:
            if run := _to_do(from_run_config(context.run_config), run_id):
                with working_on(run=run.name):
                    _train(grid, run, run_id, sinks)
        finally:
            if end_mark:
                Path(end_mark).touch()

    return served


app = app_with()
"""Trains a run, and writes its folder."""


def _to_do(run: RunSpec, run_id: str) -> RunSpec | None:
    """Return the run as it must be begun or resumed; None if it is finished.

    Raises:
        Diverged: The run of this id ended so.
    """
    begun = RunFolder.of_id(Path(run.launch.run_dir), run.name, run_id) if run_id else None
    begun = begun or RunFolder.finished_as(run)
    if begun is None:
        return run
    if begun.is_finished:
        if begun.divergence:
            raise Diverged(f"{begun.path} ended, because it diverged ({begun.divergence})")
        log.info("Run %s is finished already: %s", run.name, begun.path)
        return None
    return run if begun.last_saved_round is None else replace(run, resume=str(begun.path))


def _train(grid: Grid, run: RunSpec, run_id: str, sinks: Sequence[Sink]) -> None:
    corpus = load_corpus(run.data, run.task)
    labels = labels_of(corpus)
    tokenizer = _tokenizer(run, corpus)
    if tokenizer:
        log.info("Tokens: %s", layout_of(corpus, tokenizer, run.data))
    config = config_of(run, tokenizer, labels)
    require_rows(config, tokenizer, labels)
    if tokenizer:
        require_positions(run, config)
    device = run.launch.trunk_device
    parts = parts_of(run, config, devices_of(device)[0]) if run.baseline == "none" else None
    model = parts.client if parts else whole_of(run, config)
    recorder = RunRecorder(run, corpus, model, parts, tokenizer, run_id, sinks)
    # Clients load the tokenizer of a pretrained model by themselves.
    tokenizer_json = (
        "" if tokenizer is None or run.model.pretrained else tokenizer_to_json(tokenizer)
    )
    method = build(
        run.strategy.target if parts else "fedsplit.flower.strategy.Unsplit",
        SplitStrategy,
        client_strategy=_client_strategy(run),
        trunk=placed(parts.trunk, device) if parts else None,
        run=run,
        tokenizer=tokenizer_json,
        labels=labels,
        recorder=recorder,
    )
    with ranks_of(run.launch.trunk_tp, command_of(run)) as ranks:
        if ranks:
            method.trunk_server.cut_over(ranks)
        _rounds(grid, method, recorder, run)


def _rounds(grid: Grid, method: SplitStrategy, recorder: RunRecorder, run: RunSpec) -> None:
    # A run that is refused until here leaves no folder.
    with recorder.recording(method):
        method.start(
            grid,
            recorder.arrays,
            num_rounds=run.train.rounds,
            first_round=recorder.first_round,
            run_id=recorder.run_id,
        )


def _tokenizer(run: RunSpec, corpus: Corpus) -> TokenizersBackend | None:
    task = TASKS[run.task]
    if not task.reads_text:
        return None
    if run.model.pretrained:
        return load_tokenizer(run.model.pretrained, run.model.revision)
    # Held-out text must not decide the vocabulary.
    training, _ = hold_out(corpus, run.data.held_out, run.seed)
    return train_tokenizer(training, run.data.vocabulary, begins_texts=task.has_classes)


def _client_strategy(run: RunSpec) -> Strategy:
    """Return the strategy for the client weights; by default it selects all connected clients."""
    # A run starts with all clients. Flower waits without end for a minimum of nodes, so a client
    # that never returns would block every later round.
    minimums = dict.fromkeys(("min_train_nodes", "min_evaluate_nodes", "min_available_nodes"), 1)
    options = {"weighted_by_key": WEIGHT, **minimums, **run.client_weights.options}
    strategy: Strategy = build(run.client_weights.strategy, Strategy, **options)
    return NoisyMean(strategy, run) if run.client_weights.wrap else strategy
