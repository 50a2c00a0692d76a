"""The model card of a run's joined model: its data, its training, and its privacy."""

from collections.abc import Sequence

from fedsplit.data import TASKS, Corpus
from fedsplit.runs.metrics import evaluated, text_of_return
from fedsplit.spec import RunSpec
from fedsplit.telemetry.round import RoundStats, in_mib

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
{data}
| tokens | {tokens_of} |
| held-out share | {held_out:.0%} of each client's text |
| policy | {policy}, strategy {strategy} with {client_strategy} for the client weights |
| attention at the trunk | {attention} |
| rounds | {rounds} of {local_steps} steps per client, {trunk_steps}, {tokens:,} {unit} |
| held out | {first} in round {first_round}, {last} in round {last_round} |
| activations and gradients on the wire | {up} up, {down} down |
| client weights through Flower | {client_weights_bytes} |
| configuration fingerprint | `{fingerprint}` |

## What split learning does not protect

{privacy}

Like any language model, it may also have memorized training text.
"""

_IN_THE_CLEAR = """\
Text and labels stayed with the clients, but the server can often reconstruct the text from the
activations on the wire. This is easiest if the weights of the bottom are known, as they are here:
the server averages bottom and top every round. Compression does not prevent it. Treat this
checkpoint as trained on data that the server could read."""

_WITH_NOISE = """\
Clients added noise to what they sent (privacy={kind}, z={z:g}). Over the whole run, the server was
told at most {told}, of the worst text, at delta 1e-5. The bits bound what a server can learn from
the noisy rows and gradients, whatever it knows besides."""


def model_card(
    run: RunSpec,
    cut: str,
    attention: str,
    corpus: Corpus,
    layout: str,
    rounds: Sequence[RoundStats],
    ended: str = "",
) -> str:
    """Return the card as Markdown, with the metadata for the Hugging Face Hub on top.

    Args:
        run: The settings.
        cut: The blocks of bottom, trunk and top.
        attention: The attention implementation of the trunk.
        corpus: The corpus of all clients together.
        layout: How a document becomes tokens.
        rounds: The finished rounds, at least one.
        ended: Why training ended early, if it diverged.
    """
    measured = evaluated(rounds)
    return _TEXT.format(
        name=run.name,
        how=_how(run, rounds, ended),
        pipeline=TASKS[run.task].pipeline,
        clients=run.clients,
        model=run.model,
        split=cut,
        attention=attention,
        data=_data(run, corpus, rounds),
        # A bar ends a cell, and special tokens have some.
        tokens_of=layout.replace("|", "\\|"),
        held_out=run.data.held_out,
        policy=run.policy.kind,
        strategy=run.strategy.target,
        client_strategy=run.client_weights.strategy,
        rounds=len(rounds),
        local_steps=run.train.local_steps,
        trunk_steps=_trunk_steps(rounds),
        unit=measured[-1].unit,
        tokens=sum(stats.tokens for stats in rounds),
        first=measured[0].held_out.removeprefix("held-out "),
        first_round=measured[0].round,
        last=measured[-1].held_out.removeprefix("held-out "),
        last_round=measured[-1].round,
        up=in_mib(sum(stats.bytes_up for stats in rounds)),
        down=in_mib(sum(stats.bytes_down for stats in rounds)),
        client_weights_bytes=in_mib(sum(stats.client_weights_bytes for stats in rounds)),
        fingerprint=run.fingerprint,
        privacy=_privacy(run, rounds[-1]),
    )


def _data(run: RunSpec, corpus: Corpus, rounds: Sequence[RoundStats]) -> str:
    """Return the rows about the data: the run's corpus, and that of clients with their own."""
    # Of any round: a client that failed in one has not said it there.
    own = sorted({n for stats in rounds for n, each in stats.by_client.items() if each.own_data})
    shared = (
        f"| corpus | {corpus.name}, {corpus.num_bytes:,} bytes |\n"
        f"| corpus sha256 | `{corpus.sha256}` |\n"
        f"| sharding | {run.sharding.kind} over {run.clients} clients |"
    )
    if not own:
        return shared
    if len(own) == run.clients:
        return "| data | each client's own, which the server has not seen |"
    return f"| data | of {', '.join(own)}: their own, which the server has not seen |\n{shared}"


def _privacy(run: RunSpec, last: RoundStats) -> str:
    if not last.bits:
        return _IN_THE_CLEAR
    return _WITH_NOISE.format(kind=run.privacy.kind, z=run.privacy.z, told=last.told)


def _trunk_steps(rounds: Sequence[RoundStats]) -> str:
    short = sum(stats.short_steps for stats in rounds)
    without = f" ({short:,} of them without a client that was awaited)" if short else ""
    clipped = sum(stats.clipped_gradients for stats in rounds)
    refused = sum(stats.refused_gradients for stats in rounds)
    guard = f", {clipped:,} gradients clipped and {refused:,} refused by the guard"
    return f"{rounds[-1].version} trunk steps{without}{guard if clipped or refused else ''}"


def _how(run: RunSpec, rounds: Sequence[RoundStats], ended: str) -> str:
    returns = [f" Training went back: {text_of_return(s)}." for s in rounds if s.went_back_from]
    end = f" Training ended early, because it diverged ({ended})." if ended else ""
    return _method(run) + "".join(returns) + end


def _method(run: RunSpec) -> str:
    if run.baseline != "none":
        what = (
            "the clients' own blocks were" if run.baseline == "no_trunk" else "the whole model was"
        )
        return (
            f"Trained with fedsplit as a baseline ({run.baseline}) for split learning: {what} "
            "trained, without a trunk server."
        )
    text = (
        "Trained by federated split learning with fedsplit: no party held the whole model. "
        f"{run.clients} clients had the bottom and the top, and a server had the trunk. This "
        "checkpoint joins the parts."
    )
    personal = run.client_weights.personal
    if personal == "none":
        return text
    parts = "bottom and top" if personal == "both" else personal
    return f"{text} Each client kept its own {parts}; this checkpoint has the untrained {parts}."
