"""The table of an audit: defences as columns, attacks as rows, and the controls that judge it.

Shapes: B sequences, T tokens, D hidden width, N rows.
"""

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property, partial
from typing import Any

import torch
from torch import Tensor

from fedsplit.audit.adversary import Adversary
from fedsplit.audit.attacks.inverter import inverted
from fedsplit.audit.attacks.labels import label_scores, labels_by_refinement, labels_with_prior
from fedsplit.audit.attacks.search import search
from fedsplit.audit.attacks.words import word_scores, words_found
from fedsplit.audit.census import Seen, Shielding, seen
from fedsplit.audit.scene import Scene, share_equal
from fedsplit.audit.unknown import personal, surrogate
from fedsplit.client.privacy import NoiseKey, Shield
from fedsplit.client.remote import RemoteTrunk
from fedsplit.wire import messages as m

_BEAMS = 2
_PERSONAL_STEPS = 60
_SURROGATE_STEPS = 200
_KNOWN = 16
"""The sequences of a client that an attacker knows, such as a client that works with the server."""
KNOWN_TEXT = f"text, {_KNOWN} known"
"""The name of the attack with these."""
_STRICT = 0.5
"""The noise of `privacy=strict`."""
_KEY = NoiseKey(bytes(32))
"""No secret is protected here, and the table is the same whenever it is made."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Defence:
    """A column: what stands between a client and the server.

    Attributes:
        name: Its name.
        z: The noise on rows, in units of the public radius; 0 for none.
        is_plain: Whether rows get noise alone, without shrink and bypass.
        gradient: What the trunk gets of the gradient, as in `Shield`.
        more_blocks: The blocks by which the bottom is deeper.
        wire: Settings of `wire`.
        personal_steps: The steps that clients have trained their weights for by themselves.
        is_sealed: Whether clients seal their weights, and begin from secret ones.
    """

    name: str
    z: float = 0.0
    is_plain: bool = False
    gradient: str | float = "send"
    more_blocks: int = 0
    wire: Mapping[str, Any] = field(default_factory=dict)
    personal_steps: int = 0
    is_sealed: bool = False

    @property
    def hides_weights(self) -> bool:
        """Whether the server does not know the client weights."""
        return bool(self.personal_steps or self.is_sealed)


def defences(noise: Sequence[float], trunk_blocks: int) -> list[Defence]:
    """Return the columns for these sizes of noise, and for a trunk of so many blocks."""
    lossy = [
        Defence(name=f"{codec} up", wire={"up": codec, "grad_up": codec})
        for codec in ("int8", "int4", "topk:0.05")
    ]
    noisy = [
        Defence(name=f"{kind}noise {z:g}", z=z, is_plain=bool(kind))
        for z in noise
        if z
        for kind in ("plain ", "")
    ]
    return [
        Defence(name="off"),
        *lossy,
        *([Defence(name="one more block", more_blocks=1)] if trunk_blocks > 1 else []),
        *noisy,
        Defence(name="gradient noise 0.5", gradient=0.5),
        Defence(name="no gradient", gradient="none"),
        Defence(name=f"personal, {_PERSONAL_STEPS} steps", personal_steps=_PERSONAL_STEPS),
        Defence(name="sealed weights", is_sealed=True),
        Defence(name=f"strict {_STRICT:g}", z=_STRICT, gradient="none", is_sealed=True),
    ]


@dataclass(frozen=True, slots=True, kw_only=True)
class Cell:
    """The share of tokens that an attack recovers under a defence.

    Attributes:
        defence, attack: Their names.
        value: The share.
        chance: What a guess without the message gets right.
        n: The number of tokens.
        seconds: The time of the attack.
        seed: The seed of the run.
    """

    defence: str
    attack: str
    value: float
    chance: float
    n: int
    seconds: float
    seed: int


class Auditor:
    """Attacks one scene.

    Args:
        scene: The run as its server sees it.
    """

    def __init__(self, scene: Scene) -> None:
        self._scene = scene
        self._adversaries: dict[tuple[int, bool], Adversary] = {}

    # --- the columns ------------------------------------------------------------------------------

    def cells(self, defence: Defence) -> tuple[list[Cell], float]:
        """Return the cells of a column, and its held-out loss in nats per token."""
        found = self._seen(defence, self._scene.private_BT)
        private_BT = self._scene.private_BT
        cells = [
            self._cell(defence, "text", self._text, found, private_BT),
            self._cell(defence, "text, linear", self._linear, found, private_BT),
            self._cell(defence, KNOWN_TEXT, self._known, found, private_BT),
        ]
        # Its rows are those of text. Plain noise hides them as well as the shield's does.
        if not defence.is_plain:
            text_BT = found.text_BT[:, :-1]
            cells.append(self._cell(defence, "generation", self._generation, found, text_BT))
        if found.tensors(m.BackwardRequest, "call"):
            cells.append(self._cell(defence, "labels", self._labels, found, private_BT[:, 1:]))
        if found.client_weights and not defence.hides_weights:
            cells.append(self._words(defence, found))
        return cells, found.loss

    def _seen(self, defence: Defence, text_BT: Tensor) -> Seen:
        return seen(
            self._victim(defence),
            text_BT,
            more_blocks=defence.more_blocks,
            shielding=self._shielding(defence),
            **defence.wire,
        )

    def census(self) -> dict[str, str]:
        """Return what left in a step without a defence, and the attack that covers it."""
        return seen(self._scene, self._scene.private_BT).census()

    def negative(self) -> float:
        """Return what the search reads of the private text in rows of another text."""
        found = seen(self._scene, self._scene.others_BT)
        guessed_BT = self._text(Defence(name="off"), found)
        return share_equal(guessed_BT, self._scene.private_BT[: len(guessed_BT)])

    def _cell(
        self,
        defence: Defence,
        name: str,
        attack: Callable[[Defence, Seen], Tensor],
        found: Seen,
        true_BT: Tensor,
    ) -> Cell:
        begin = time.monotonic()
        value = share_equal(attack(defence, found), true_BT)
        return Cell(
            defence=defence.name,
            attack=name,
            value=value,
            chance=self._prior_share if name == "labels" else self._scene.most_frequent,
            n=true_BT.numel(),
            seconds=time.monotonic() - begin,
            seed=self._scene.run.seed,
        )

    def _words(self, defence: Defence, found: Seen) -> Cell:
        begin, change_VD = time.monotonic(), found.embedding_change_VD
        scores_V = word_scores(change_VD, is_tied=self._scene.is_tied)
        words = len(torch.unique(self._scene.private_BT))
        return Cell(
            defence=defence.name,
            attack="words",
            value=words_found(scores_V, self._scene.private_BT.flatten()),
            chance=words / len(change_VD),
            n=words,
            seconds=time.monotonic() - begin,
            seed=self._scene.run.seed,
        )

    # --- the attacks ------------------------------------------------------------------------------

    def _text(self, defence: Defence, found: Seen) -> Tensor:
        (rows_BTD,) = found.tensors(m.ForwardRequest, "smashed_BTD")
        return self._searched(defence, rows_BTD)

    def _generation(self, defence: Defence, found: Seen) -> Tensor:
        rows = found.tensors(m.GenerateRequest, "smashed_BTD")
        return self._searched(defence, torch.cat(rows, dim=1))

    def _searched(self, defence: Defence, rows_BTD: Tensor) -> Tensor:
        known = self._of(defence)
        attack = partial(search, ends=known.ends, bottom=known.bottom)
        if not defence.z:
            return attack(rows_BTD.float())
        return attack(
            self._unshrunk(defence, rows_BTD.float()),
            sigma=defence.z * known.public.radius,
            expected=known.public.clipped,
            prior=self._scene.whole,
            beams=_BEAMS,
        )

    def _linear(self, defence: Defence, found: Seen) -> Tensor:
        (rows_BTD,) = found.tensors(m.ForwardRequest, "smashed_BTD")
        guessed_N = inverted(
            self._unshrunk(defence, rows_BTD.float()).flatten(0, 1),
            self._of(defence).public_ND,
            self._scene.public_BT.flatten(),
            self._of(defence).head_VD.shape[0],
            matched=defence.hides_weights,
        )
        return guessed_N.view(rows_BTD.shape[:2])

    def _known(self, defence: Defence, found: Seen) -> Tensor:
        """Read the text with a linear map that is fitted to known sequences of a client."""
        known_BT = self._scene.public_BT[:_KNOWN, : found.text_BT.shape[1]]
        # In pieces of the size of the private step, which is what a trunk of the run takes.
        pieces = known_BT.split(len(self._scene.private_BT))
        rows = [self._rows_of(self._seen(defence, each)) for each in pieces]
        (rows_BTD,) = found.tensors(m.ForwardRequest, "smashed_BTD")
        guessed_N = inverted(
            rows_BTD.float().flatten(0, 1),
            torch.cat(rows),
            known_BT.flatten(),
            self._of(defence).head_VD.shape[0],
        )
        return guessed_N.view(rows_BTD.shape[:2])

    @staticmethod
    def _rows_of(found: Seen) -> Tensor:
        (rows_BTD,) = found.tensors(m.ForwardRequest, "smashed_BTD")
        rows_ND: Tensor = rows_BTD.float().flatten(0, 1)
        return rows_ND

    def _labels(self, defence: Defence, found: Seen) -> Tensor:
        (grad_BTD,) = found.tensors(m.BackwardRequest, "grad_trunk_out_BTD")
        grad_BTD = grad_BTD[:, :-1].float()
        if isinstance(defence.gradient, float):
            log_shares_BTV = self._log_shares_BTV
            sigma = defence.gradient * self._of(defence).grad_radius
            return labels_with_prior(grad_BTD, self._of(defence).head_VD, log_shares_BTV, sigma)
        if defence.z or defence.hides_weights:
            # The top's input is not known, so the gradient of a label cannot be computed.
            return label_scores(grad_BTD, self._of(defence).head_VD).argmax(-1)
        return labels_by_refinement(grad_BTD, self._of(defence).head_VD, self._of(defence).gradient)

    # --- what the attacker knows ------------------------------------------------------------------

    def _of(self, defence: Defence) -> Adversary:
        return self._adversary(defence.more_blocks, is_guessing=defence.is_sealed)

    def _client_of(self, defence: Defence) -> Adversary:
        """Return what the client itself knows of its rows, for the statistics of its shield."""
        return self._adversary(defence.more_blocks, is_guessing=False)

    def _adversary(self, more_blocks: int, *, is_guessing: bool) -> Adversary:
        key = more_blocks, is_guessing
        if key not in self._adversaries:
            known = self._guessed if is_guessing else self._scene
            self._adversaries[key] = Adversary(known, more_blocks)
        return self._adversaries[key]

    def _victim(self, defence: Defence) -> Scene:
        """Return the clients of the run, whose weights the server may not know."""
        return self._changed if defence.personal_steps else self._scene

    @cached_property
    def _changed(self) -> Scene:
        return replace(self._scene, whole=personal(self._scene, _PERSONAL_STEPS))

    @cached_property
    def _guessed(self) -> Scene:
        return replace(self._scene, whole=surrogate(self._scene, _SURROGATE_STEPS))

    def _unshrunk(self, defence: Defence, rows_BTD: Tensor) -> Tensor:
        """Undo the shrinking of rows, which is a known map."""
        if not defence.z or defence.is_plain:
            return rows_BTD
        public = self._of(defence).public
        map_DD = public.shrinking(defence.z * public.radius)
        rest_BTD: Tensor = torch.linalg.solve(map_DD.T, (rows_BTD - public.mean_D).mT).mT
        return public.mean_D + rest_BTD

    @cached_property
    def _log_shares_BTV(self) -> Tensor:
        with torch.no_grad():
            logits_BTV: Tensor = self._scene.whole(self._scene.private_BT).logits
        return logits_BTV[:, :-1].float().log_softmax(-1)

    @property
    def _prior_share(self) -> float:
        """What the model itself guesses of the labels from the text before them."""
        return share_equal(self._log_shares_BTV.argmax(-1), self._scene.private_BT[:, 1:])

    def _shielding(self, defence: Defence) -> Shielding | None:
        if not defence.z and defence.gradient == "send":
            return None

        def around(trunk: RemoteTrunk) -> Shield:
            return Shield(
                trunk,
                self._client_of(defence).public,
                _KEY,
                z=defence.z,
                gradient=defence.gradient,
                grad_radius=self._client_of(defence).grad_radius,
                bypass=not defence.is_plain,
                shrink=not defence.is_plain,
            )

        return around
