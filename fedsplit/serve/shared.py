"""What both sides of `fedsplit serve` agree on: where a trunk is, and the run it is built from."""

from dataclasses import replace

from fedsplit.errors import ConfigError
from fedsplit.spec import RunSpec

ADDRESS = "127.0.0.1:9500"
"""Where a trunk is served, and looked for, by default."""


def pretrained_run(run: RunSpec, model: str, revision: str, adapter: str) -> RunSpec:
    """A run that starts from this model, to build one of its parts.

    Raises:
        ConfigError: `lora.enabled` would add new adapters where a trained one goes.
    """
    if adapter and run.lora.enabled:
        raise ConfigError(
            f"lora.enabled=true would put fresh adapters where {adapter} goes; use one of the two"
        )
    return replace(run, model=replace(run.model, pretrained=model, revision=revision))
