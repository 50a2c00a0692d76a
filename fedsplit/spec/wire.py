"""The settings of the stream between clients and trunk."""

from dataclasses import dataclass
from typing import Annotated

from fedsplit.errors import ConfigError
from fedsplit.spec.checks import DURATION, AtLeast, Codec, OneOf, Positive, check_fields


@dataclass(frozen=True, slots=True, kw_only=True)
class WireSpec:
    """The stream between client and trunk: addresses, TLS, codecs and limits.

    The codecs and the history decide numbers; addresses, TLS, times and the stash do not.

    Attributes:
        bind: The address on which the trunk server listens: host:port, where port 0 picks a free
            one, or unix:path.
        advertise: The address that clients call, if it differs from wire.bind.
        tls_cert: The PEM file of the server's certificate chain; wire.tls_key goes with it.
        tls_key: The PEM file of the server's key.
        tls_ca: The PEM file of the authority that clients trust.
        insecure: Whether other machines may connect without TLS.
        up: The codec of the hidden states that the client sends.
        down: The codec of the hidden states that the trunk sends.
        history_bytes (bytes): The most that each side stores of the last hidden states of a
            client's examples, so that the wire carries the difference to them (0: none).
        grad_up: The codec of the gradients that the client sends.
        grad_down: The codec of the gradients that the trunk sends.
        client_weights: The codec of the client weights that Flower carries, in both directions.
        call_deadline_s (seconds): The longest time of one call.
        budget_s (seconds): The longest time of one call with all its retries.
        stash_ttl_s (seconds): The longest time that the trunk stores activations that wait for
            their backward.
        stash_bytes (bytes): The most memory for activations that wait for their backward.
    """

    bind: str = "127.0.0.1:0"
    advertise: str = ""
    tls_cert: str = ""
    tls_key: str = ""
    tls_ca: str = ""
    insecure: bool = False
    up: Annotated[str, Codec()] = "none"
    down: Annotated[str, Codec()] = "none"
    history_bytes: Annotated[int, AtLeast(0)] = 0
    grad_up: Annotated[str, Codec()] = "none"
    grad_down: Annotated[str, Codec()] = "none"
    client_weights: Annotated[str, OneOf("none", "fp16", "int8")] = "none"
    call_deadline_s: Annotated[float, DURATION] = 120.0
    budget_s: Annotated[float, DURATION] = 300.0
    stash_ttl_s: Annotated[float, DURATION] = 300.0
    stash_bytes: Annotated[int, Positive()] = 4 << 30

    def __post_init__(self) -> None:
        check_fields(self, "wire")
        if self.history_bytes and "none" in (self.up, self.down):
            raise ConfigError(
                f"wire.history_bytes is for what is compressed, but wire.up={self.up} and "
                f"wire.down={self.down}; set both, or wire.history_bytes=0"
            )
        if bool(self.tls_cert) != bool(self.tls_key):
            raise ConfigError("wire.tls_cert and wire.tls_key go together; set both or neither")
        if not (self.is_local or self.tls_cert or self.insecure):
            raise ConfigError(
                f"wire.bind={self.bind} can be reached from other machines without encryption; "
                "set wire.tls_cert and wire.tls_key, or wire.insecure=true if you mean it"
            )
        if not self.advertise and self.bind.startswith(("0.0.0.0:", "[::]:")):
            raise ConfigError(
                f"wire.bind={self.bind} is every address of this machine and none that a client "
                "can call; set wire.advertise=host:port"
            )

    @property
    def is_local(self) -> bool:
        """Whether only this machine can reach the trunk server."""
        host = self.bind.rpartition(":")[0]
        return self.bind.startswith("unix:") or host in ("127.0.0.1", "localhost", "[::1]")
