"""The agreement of client and trunk at Open: one model and cut, one run, and the same weights."""

import functools
from collections.abc import Mapping
from dataclasses import dataclass

from fedsplit.errors import ModelMismatch, ProtocolVersion
from fedsplit.model.identity import difference, misfit, model_fingerprint, model_settings
from fedsplit.model.stage import TrunkPart
from fedsplit.spec import RunSpec
from fedsplit.wire.messages import PROTOCOL, OpenRequest

_TRAINED = (
    ". The trunk has trained since, to version {version}, and its digest is still that of the "
    "weights that it started from. A client of a joined model has others: build it from the "
    "trunk's start, and load its trained weights with load_state_dict"
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Agreement:
    """What the trunk has; a client that opens a session must have the same.

    Attributes:
        hidden_size: The width of the hidden states.
        model: The fingerprint of config and cut.
        model_settings: The settings behind it.
        run: The run that the trunk serves.
        identity: The digests of the trunk's weights and adapter. It is the trunk's own dictionary,
            so that an adapter which is loaded later counts.
    """

    hidden_size: int
    model: str
    model_settings: Mapping[str, str]
    run: RunSpec
    identity: Mapping[str, str]

    @staticmethod
    def of(trunk: TrunkPart, run: RunSpec) -> "Agreement":
        """The agreement for a trunk that serves a run."""
        return Agreement(
            hidden_size=trunk.config.hidden_size,
            model=model_fingerprint(trunk.config, run.split),
            model_settings=model_settings(trunk.config, run.split),
            run=run,
            identity=trunk.identity,
        )

    def check(self, request: OpenRequest, version: int) -> None:
        """Refuse a client that has another model, cut or run, or other weights.

        Clients that only evaluate or generate may be of any run.

        Args:
            request: The client's.
            version: The version of the trunk's parameters, 0 before its first step.

        Raises:
            ProtocolVersion: The client speaks another version of the protocol.
            ModelMismatch: The message names what differs, with both values.
        """
        if request.protocol != PROTOCOL:
            raise ProtocolVersion(
                f"the client speaks protocol {request.protocol}, the trunk {PROTOCOL}; install "
                "the same version of fedsplit at both sides"
            )
        _require_same("hidden size", str(request.hidden_size), str(self.hidden_size))
        settings = request.model_settings, self.model_settings
        _require_same("model and cut (fingerprint)", request.model, self.model, settings)
        if request.training or request.config:
            fingerprint, texts = _settings_of(self.run)
            settings = request.run_settings, texts
            _require_same("run configuration (fingerprint)", request.config, fingerprint, settings)
        if found := misfit(request.identity, self.identity):
            trained = _TRAINED.format(version=version) if version else ""
            raise ModelMismatch(f"{found}{trained}")


# A trunk opens many sessions of one run, and the text of its settings takes as long as a forward.
@functools.lru_cache(maxsize=64)
def _settings_of(run: RunSpec) -> tuple[str, Mapping[str, str]]:
    return run.fingerprint, run.texts


def _require_same(
    what: str,
    theirs: str,
    ours: str,
    settings: tuple[Mapping[str, str], Mapping[str, str]] = ({}, {}),
) -> None:
    """Raise ModelMismatch if two values differ; it names the settings behind them, if known."""
    if theirs != ours:
        # A client sends its settings only after it was refused once.
        named = difference(*settings) if settings[0] else ""
        found = named or f"the client has {theirs}, the trunk {ours}"
        raise ModelMismatch(
            f"{what}: {found}; start both from the same model, split and configuration"
        )
