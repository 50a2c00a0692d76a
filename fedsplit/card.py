"""The model card of a run's joined model: what it was trained on, how, and what that hides."""

from collections.abc import Sequence

from fedsplit.data import Corpus
from fedsplit.metrics import RoundStats, in_mib
from fedsplit.spec import RunSpec

_TEXT = """\
---
library_name: transformers
pipeline_tag: text-generation
tags: [split-learning, federated-learning, fedsplit]
---
# {name}

Trained by federated split learning with fedsplit: no party held the whole model. {clients} clients
kept the bottom and the top, a server the trunk. This checkpoint joins the parts.

| | |
|---|---|
| model | {model} |
| split (bottom/trunk/top, blocks) | {split} |
| corpus | {corpus}, {corpus_bytes:,} bytes |
| corpus sha256 | `{sha256}` |
| sharding | {sharding} over {clients} clients, {held_out:.0%} held out |
| policy | {policy}, strategy {strategy} with {halves} for the halves |
| rounds | {rounds} of {local_steps} steps per client, {version} trunk steps, {tokens:,} tokens |
| held-out bits per byte | {first:.4f} after round 1, {last:.4f} at the end |
| activations and gradients on the wire | {up} up, {down} down |
| halves through Flower | {halves_bytes} |
| configuration fingerprint | `{fingerprint}` |

## What split learning does not protect

Text and labels stayed with the clients, but the activations that crossed the wire can often be
turned back into text by whoever sees them, above all where the bottom's weights are public or
known, as they are here: bottom and top are averaged by the server every round. Compression does
not change that. Read this checkpoint as trained on data that the server could have read. The
weights themselves may also remember training text, as any language model's may.
"""


def model_card(
    run: RunSpec, trunk_blocks: range, num_blocks: int, corpus: Corpus, rounds: Sequence[RoundStats]
) -> str:
    """The card as markdown, with the metadata that hubs read on top."""
    cut = (trunk_blocks.start, len(trunk_blocks), num_blocks - trunk_blocks.stop)
    return _TEXT.format(
        name=run.name,
        clients=run.clients,
        model=run.model,
        split="/".join(str(count) for count in cut),
        corpus=corpus.name,
        corpus_bytes=corpus.num_bytes,
        sha256=corpus.sha256,
        sharding=run.sharding.kind,
        held_out=run.data.held_out,
        policy=run.policy.kind,
        strategy=run.strategy.target,
        halves=run.strategy.halves,
        rounds=len(rounds),
        local_steps=run.train.local_steps,
        version=rounds[-1].version,
        tokens=sum(stats.tokens for stats in rounds),
        first=rounds[0].bits_per_byte,
        last=rounds[-1].bits_per_byte,
        up=in_mib(sum(stats.bytes_up for stats in rounds)),
        down=in_mib(sum(stats.bytes_down for stats in rounds)),
        halves_bytes=in_mib(sum(stats.halves_bytes for stats in rounds)),
        fingerprint=run.fingerprint,
    )
