"""A SuperNode's machine, as its config describes it."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from flwr.app import Context, Message, RecordDict

from fedsplit.flower.client_app import app as product
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


@dataclass(frozen=True, slots=True, kw_only=True)
class SuperNode:
    """The product's client app on a machine whose owner trusts no run, with this node config."""

    config: Mapping[str, Any] = field(default_factory=dict)

    def __call__(self, message: Message, context: Context) -> Message:
        """Answer a message as the product does there."""
        context.node_config = {**context.node_config, "trust-runs": False, **self.config}
        return product(message, context)
