"""A SuperNode's machine, as its config describes it."""

from typing import Any

from flwr.app import Context, RecordDict

from fedsplit.flower.node import Node
from fedsplit.spec import RunSpec


def node_of(run: RunSpec, **config: Any) -> Node:
    """The node of a SuperNode that does not trust runs; keys have underscores or dashes."""
    settings = {"partition-id": 0, "num-partitions": run.num_nodes, "trust-runs": False}
    named = {key.replace("_", "-"): value for key, value in config.items()}
    return Node.of(
        Context(
            run_id=1,
            node_id=1,
            node_config={**settings, **named},
            state=RecordDict(),
            run_config={},
        ),
        run,
    )
