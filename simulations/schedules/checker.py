"""The checker: reads the events of a schedule and says which invariants they violate.

`fedsplit` promises I1 to I8, which `simulations.schedules.model` lists.
"""

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from simulations.schedules.clients import TOKENS
from simulations.schedules.events import TRUNK, Event
from simulations.schedules.expected import input_of
from simulations.schedules.model import TrunkModel
from simulations.schedules.play import BUDGET_S, CALL_S, Played
from simulations.schedules.speaking import hidden_of, token_of
from simulations.schedules.trunk import Values, output_of

_MOST_S = 1.1 * (BUDGET_S + CALL_S)
_REFUSALS = ("STALE_VERSION", "SESSION_LOST", "PROTOCOL", "GRAD_EXPLODED", "NONFINITE", "INTERNAL")


def check(played: Played, final: Mapping[str, str] | None = None) -> list[str]:
    """Return the violations in a schedule that was played, one sentence each.

    Args:
        played: The schedule and its events.
        final: The digest of the weights of each side at the end of the run without faults, if they
            must be the same.
    """
    return _Checker(played, final or {}).check()


def final_weights(played: Played) -> dict[str, str]:
    """Return the digest of the weights of each side at the end."""
    ends = [each for each in played.log if each.what in ("ended", "finished") and each.digest]
    return {each.side: each.digest for each in ends}


class _Checker:
    def __init__(self, played: Played, final: Mapping[str, str]) -> None:
        self.violations: list[str] = []
        self._played = played
        self._final = final
        self._model = TrunkModel(played.run, self.violations)
        self._versions: dict[tuple[str, str], Event] = {}
        self._texts: dict[str, list[list[Values]]] = {}
        self._of_client: dict[str, Callable[[Event], None]] = {
            "asks": self._asks,
            "got": self._got,
            "got an error": self._got_an_error,
            "gave up": self._lost_track,
            "was killed": self._lost_track,
            "hangs": self._hangs,
            "generated": self._generated,
        }

    def check(self) -> list[str]:
        for event in self._played.log:
            if event.side == TRUNK:
                self._model.see(event)
            elif method := self._of_client.get(event.what):
                method(event)
        self._check_end(self._played.log.events[-1])
        return self.violations

    def _asks(self, event: Event) -> None:
        if event.kind == "forward":
            key = event.session, event.call
            self._model.inputs[key] = input_of(event.data, self._played.run.wire.up)
        elif event.kind == "generate" and event.data.past == 0:
            self._texts.setdefault(event.side, [])

    def _got(self, event: Event) -> None:
        began, request, reply = event.data
        self._require_in_time(event, began)
        is_delta = getattr(request, "bases_B", None) is not None
        known = self._model.answers.get((event.session, event.kind, event.call), set())
        if event.kind != "open" and not is_delta and f"{event.version} {event.digest}" not in known:
            self.violations.append(
                f"I1: {event.side} got a reply that the trunk never gave: {event}"
            )
        if event.kind == "step":
            self._model.may_repeat.discard(event.side)
        if event.kind == "generate":
            text = self._texts.setdefault(event.side, [])
            text.append(self._model.spoken.get((event.session, event.call), []))
        if event.kind in ("open", "forward"):
            incarnation = reply.server_instance_id if event.kind == "open" else event.incarnation
            last = self._versions.get((event.side, incarnation))
            if last and event.version < last.version:
                self.violations.append(
                    f"I2: {event.side} sees version {event.version} after version {last.version} "
                    f"of the same incarnation: {last}, then {event}"
                )
            self._versions[event.side, incarnation] = event

    def _got_an_error(self, event: Event) -> None:
        self._require_in_time(event, event.data)
        step = self._model.steps.get((event.session, event.call)) if event.kind == "step" else None
        code = event.note.split(":")[0]
        if step and step.accepted and code in _REFUSALS:
            self.violations.append(
                f"I1: the acknowledgement of a step was lost: {step.accepted}, and then {event}"
            )

    def _lost_track(self, event: Event) -> None:
        self._model.may_repeat.add(event.side)
        self._texts.pop(event.side, None)

    def _hangs(self, event: Event) -> None:
        self.violations.append(f"I7: a call of {event.side} never ends: {event}")

    def _require_in_time(self, event: Event, began: float) -> None:
        if event.time - began > _MOST_S:
            self.violations.append(
                f"I7: a call took {event.time - began:.1f} s, and has {_MOST_S:.1f} s: {event}"
            )

    def _generated(self, event: Event) -> None:
        spoken, history = event.note.split(), [hidden_of(token) for token in range(TOKENS)]
        for place, (token, found) in enumerate(
            zip(spoken, self._texts.get(event.side, []), strict=False)
        ):
            x_BTD = np.stack(history)[None]
            wanted = {token_of(output_of(x_BTD, values)[0, -1]) for values in found}
            if found and int(token) not in wanted:
                self.violations.append(
                    f"I5: token {place} of {event.side} is {token}, but without faults it is "
                    f"{' or '.join(map(str, sorted(wanted)))}: {event}"
                )
                return
            history.append(hidden_of(int(token)))

    def _check_end(self, event: Event) -> None:
        self._model.end(event)
        gave_up = any(each.what == "gave up" for each in self._played.log)
        ours: Any = final_weights(self._played)
        if self._final and not gave_up:
            for side, digest in self._final.items():
                if ours.get(side) != digest:
                    self.violations.append(
                        f"I4: the weights of {side} at the end are sha256 {ours.get(side)}, but "
                        f"without faults {digest}"
                    )
