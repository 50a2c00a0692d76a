"""The default address of `fedsplit serve`, and the run that both sides build their parts from."""

from dataclasses import replace

from fedsplit.errors import ConfigError
from fedsplit.spec import RunSpec

ADDRESS = "127.0.0.1:9500"
"""The default address of a trunk, for server and client."""


def pretrained_run(run: RunSpec, model: str, revision: str, adapter: str) -> RunSpec:
    """The run with this pretrained model, to build one of the model's parts.

    Raises:
        ConfigError: `lora.enabled` would add new adapters in place of the trained one.
    """
    if adapter and run.lora.enabled:
        raise ConfigError(
            f"lora.enabled=true would put fresh adapters where {adapter} goes; use one of the two"
        )
    return replace(run, model=replace(run.model, pretrained=model, revision=revision))
