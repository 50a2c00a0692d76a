"""The shield of a client of a run: its noise key, its ledger, and its public text."""

import math
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager

from torch import Tensor
from transformers import TokenizersBackend

from fedsplit.client.ledger import Ledger
from fedsplit.client.privacy import NoiseKey, Shield
from fedsplit.client.public_text import (
    gradient_radius,
    public_ids,
    public_rows,
)
from fedsplit.flower.node import Node
from fedsplit.model import ClientPart
from fedsplit.spec import RunSpec


@contextmanager
def shielded(
    node: Node,
    run: RunSpec,
    run_id: str,
    model: ClientPart,
    tokenizer: TokenizersBackend | None,
    trunk: Callable[..., Tensor],
) -> Iterator["ClientShield | None"]:
    """A context with the shield of a client's trunk; None if neither run nor node wants one.

    Args:
        node: The client's machine, which decides the noise.
        run: The run.
        run_id: Its id.
        model: The client's model with the weights of this message.
        tokenizer: The run's tokenizer.
        trunk: The trunk.

    Raises:
        ConfigError: The run would undo the protection, or the machine keeps no state.
        DataError: The public text cannot be used.
        StorageError: Key or ledger cannot be written.
    """
    privacy = node.privacy
    if privacy.kind == "off":
        yield None
        return
    folder = node.secrets_of(run, run_id)
    key = NoiseKey.kept(folder / "noise.key")
    ids_BT = public_ids(privacy.public, run.data.sequence_length, tokenizer, model.config)
    # In the mode isolated the trunk's output is a constant, and no gradient is sent.
    gradient = "none" if run.train.mode == "isolated" else privacy.gradient_z or "send"
    is_classifier = run.task != "causal_lm"
    with closing(Ledger(folder / "ledger.db", privacy.budget_bits)) as ledger:
        shield = Shield(
            trunk,
            public_rows(model, ids_BT),
            key,
            z=privacy.z,
            gradient=gradient,
            grad_radius=(
                gradient_radius(model, ids_BT, is_classifier=is_classifier)
                if isinstance(gradient, float)
                else math.inf
            ),
            ledger=ledger,
        )
        vocabulary = model.config.vocab_size
        yield ClientShield(shield, ledger, vocabulary, sends_labels=gradient == "send")


class ClientShield:
    """A shield and the ledger of what went through it.

    Args:
        shield: The shield.
        ledger: Its ledger.
        vocabulary: The number of tokens.
        sends_labels: Whether gradients are sent as they are.
    """

    def __init__(
        self, shield: Shield, ledger: Ledger, vocabulary: int, *, sends_labels: bool
    ) -> None:
        self.shield = shield
        self._ledger = ledger
        self._most_bits = math.log2(vocabulary)
        self._sends_labels = sends_labels

    @property
    def numbers(self) -> dict[str, float]:
        """What the worst text has told so far, as the numbers of a reply."""
        rows, labels = self._ledger.spent("rows"), self._ledger.spent("labels")
        # No token has more bits than the choice among all of them.
        label_bits = self._most_bits if self._sends_labels else min(labels.bits, self._most_bits)
        return {
            "row-epsilon": rows.row_epsilon,
            "sequence-epsilon": rows.sequence_epsilon,
            "bits": min(rows.bits, self._most_bits),
            "label-bits": label_bits,
        }
