"""Flower's server: makes the parts, hosts the trunk for a strategy, and keeps what comes out."""

import logging
from pathlib import Path

from flwr.app import Context
from flwr.serverapp import Grid, ServerApp
from flwr.serverapp.strategy import Strategy
from transformers import TokenizersBackend

from fedsplit.config import build, from_run_config, to_yaml
from fedsplit.console import quiet_libraries
from fedsplit.data import (
    Corpus,
    hold_out,
    load_corpus,
    load_tokenizer,
    tokenizer_to_json,
    train_tokenizer,
)
from fedsplit.flower.hosting import TrunkHost
from fedsplit.flower.records import WEIGHT, load_arrays, to_arrays
from fedsplit.metrics import RoundStats
from fedsplit.model.describe import config_of, parts_of
from fedsplit.model.lora import trainable
from fedsplit.run_folder import RunFolder
from fedsplit.spec import RunSpec

log = logging.getLogger("flwr.fedsplit")

app = ServerApp()


@app.main()
def main(grid: Grid, context: Context) -> None:
    """Train, and leave the run's folder behind."""
    quiet_libraries()
    run = from_run_config(context.run_config)
    corpus = load_corpus(run.data)
    tokenizer = _tokenizer(run, corpus)
    parts = parts_of(run, config_of(run.model, tokenizer))

    def on_round(stats: RoundStats) -> None:
        folder.append(stats)
        log.info("%s", stats.line)

    host = TrunkHost(parts.trunk, run)
    strategy: Strategy = build(
        run.strategy.target,
        halves=_halves(run),
        host=host,
        run=run,
        tokenizer="" if run.model.pretrained else tokenizer_to_json(tokenizer),
        on_round=on_round,
    )
    # A run that is refused until here leaves no folder.
    folder = RunFolder.begin(Path(run.launch.run_dir), run.name, to_yaml(run))
    log.info("Run %s: configuration %s, folder %s", run.name, run.fingerprint, folder.path)
    halves = trainable(parts.client)
    result = strategy.start(grid, to_arrays(halves), num_rounds=run.train.rounds)
    load_arrays(halves, result.arrays)
    folder.keep(parts, tokenizer, corpus, run, host.service.engine.moments())
    log.info("Run %s is done: %s", run.name, folder.path)


def _tokenizer(run: RunSpec, corpus: Corpus) -> TokenizersBackend:
    if run.model.pretrained:
        return load_tokenizer(run.model.pretrained, run.model.revision)
    training, _ = hold_out(corpus, run.data.held_out, run.seed)
    return train_tokenizer(training, run.data.vocabulary)


def _halves(run: RunSpec) -> Strategy:
    """The wrapped strategy; by default it takes all clients that are connected."""
    # The run begins with all of them. Flower waits without end for a minimum of nodes, so that
    # one that is gone for good would keep the others from every later round.
    anybody = dict.fromkeys(("min_train_nodes", "min_evaluate_nodes", "min_available_nodes"), 1)
    options = {"weighted_by_key": WEIGHT, **anybody, **run.strategy.halves_options}
    halves: Strategy = build(run.strategy.halves, **options)
    return halves
