"""SuperNodes' machines, as their configs describe them."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from flwr.app import Context, Message, RecordDict
from flwr.clientapp import ClientApp
from flwr.common.constant import SUPERLINK_NODE_ID

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


@dataclass(frozen=True, slots=True, kw_only=True)
class SuperNodes:
    """The product on machines with these configs, in the order in which the server sees them."""

    configs: list[Mapping[str, Any]]
    app: ClientApp = field(default=product)

    def __call__(self, message: Message, context: Context) -> Message:
        """Answer a message as the product does on the machine of this node."""
        own = self.configs[context.node_id - SUPERLINK_NODE_ID - 1]
        context.node_config = {"trust-runs": False, **own}
        return self.app(message, context)
