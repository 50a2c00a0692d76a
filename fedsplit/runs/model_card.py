"""The model card of a run's joined model: what it was trained on, how, and what that hides."""

from collections.abc import Sequence

from fedsplit.data import TASKS, Corpus
from fedsplit.runs.metrics import RoundStats, evaluated, in_mib
from fedsplit.spec import RunSpec

_TEXT = """\
---
library_name: transformers
pipeline_tag: {pipeline}
tags: [split-learning, federated-learning, fedsplit]
---
# {name}

{how}

| | |
|---|---|
| model | {model} |
| split (bottom/trunk/top, blocks) | {split} |
| corpus | {corpus}, {corpus_bytes:,} bytes |
| corpus sha256 | `{sha256}` |
| sharding | {sharding} over {clients} clients, {held_out:.0%} held out |
| policy | {policy}, strategy {strategy} with {halves} for the halves |
| attention at the trunk | {attention} |
| rounds | {rounds} of {local_steps} steps per client, {version} trunk steps, {tokens:,} {unit} |
| held out | {first} in round {first_round}, {last} in round {last_round} |
| activations and gradients on the wire | {up} up, {down} down |
| client weights through Flower | {halves_bytes} |
| configuration fingerprint | `{fingerprint}` |

## What split learning does not protect

Text and labels stayed with the clients, but the activations that crossed the wire can often be
turned back into text by whoever sees them, above all where the bottom's weights are public or
known, as they are here: bottom and top are averaged by the server every round. Compression does
not change that. Read this checkpoint as trained on data that the server could have read. The
weights themselves may also remember training text, as any language model's may.
"""


def model_card(
    run: RunSpec, cut: str, attention: str, corpus: Corpus, rounds: Sequence[RoundStats]
) -> str:
    """The card as markdown, with the metadata that hubs read on top."""
    measured = evaluated(rounds)
    return _TEXT.format(
        name=run.name,
        how=_how(run),
        pipeline=TASKS[run.task].pipeline,
        clients=run.clients,
        model=run.model,
        split=cut,
        attention=attention,
        corpus=corpus.name,
        corpus_bytes=corpus.num_bytes,
        sha256=corpus.sha256,
        sharding=run.sharding.kind,
        held_out=run.data.held_out,
        policy=run.policy.kind,
        strategy=run.strategy.target,
        halves=run.halves.strategy,
        rounds=len(rounds),
        local_steps=run.train.local_steps,
        version=rounds[-1].version,
        unit=measured[-1].unit,
        tokens=sum(stats.tokens for stats in rounds),
        first=measured[0].held_out.removeprefix("held-out "),
        first_round=measured[0].round,
        last=measured[-1].held_out.removeprefix("held-out "),
        last_round=measured[-1].round,
        up=in_mib(sum(stats.bytes_up for stats in rounds)),
        down=in_mib(sum(stats.bytes_down for stats in rounds)),
        halves_bytes=in_mib(sum(stats.halves_bytes for stats in rounds)),
        fingerprint=run.fingerprint,
    )


def _how(run: RunSpec) -> str:
    if run.baseline != "none":
        return (
            f"Trained with fedsplit as a baseline ({run.baseline}) for split learning: the whole "
            "model, without a trunk server."
        )
    text = (
        "Trained by federated split learning with fedsplit: no party held the whole model. "
        f"{run.clients} clients kept the bottom and the top, a server the trunk. This checkpoint "
        "joins the parts."
    )
    if run.halves.personal == "none":
        return text
    kept = "bottom and top" if run.halves.personal == "both" else run.halves.personal
    return f"{text} Each client's {kept} stayed its own; in here are the untrained ones."
