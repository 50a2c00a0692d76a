"""Whether a run fits a method of split learning."""

from collections.abc import Collection

from flwr.serverapp.strategy import Strategy

from fedsplit.errors import ConfigError
from fedsplit.flower.strategy.state import only_averages
from fedsplit.spec import RunSpec


def require_fit(
    name: str,
    run: RunSpec,
    client_strategy: Strategy,
    *,
    policies: Collection[str],
    averages_clients: bool,
) -> None:
    """Refuse a run whose policy or strategy for the client weights does not fit a method.

    Args:
        name: The method.
        run: The run.
        client_strategy: The Flower strategy for the client weights.
        policies: The policies that the method works with.
        averages_clients: Whether the method lets that strategy aggregate the client weights.

    Raises:
        ConfigError: The run does not fit; the text names the setting and what to do.
    """
    policy, strategy = run.policy, type(client_strategy).__name__
    if policy.kind not in policies:
        raise ConfigError(
            f"policy={policy.kind} does not go with {name}; use policy="
            f"{' or policy='.join(policies)}"
        )
    if run.client_weights.sealed and not averages_clients:
        raise ConfigError(
            f"{name} hands the client weights from client to client, and sealed ones are added; "
            "use client_weights=averaged or another strategy"
        )
    why = ""
    if policy.kind == "async":
        why = "policy=async mixes client weights by itself (policy.mixing, policy.buffer)"
    elif not averages_clients:
        why = f"{name} hands the client weights from client to client"
    elif run.client_weights.personal == "both":
        why = "client_weights.personal=both leaves nothing to aggregate"
    if why and run.client_weights.wrap:
        raise ConfigError(f"{why}, so client_weights.wrap would have no effect; leave it empty")
    if why and not only_averages(client_strategy):
        raise ConfigError(
            f"{why}, so client_weights.strategy={strategy} would have no effect; use "
            "flwr.serverapp.strategy.FedAvg"
        )
