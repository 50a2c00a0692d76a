"""The model of the trunk: what it should compute and accept, from the events of both sides.

It follows the trunk's parameters in numpy, one branch of their history after the other: a trunk
that begins again from a checkpoint begins a branch. Each violation is a sentence that names its
invariant and the events that show it:

I1 every gradient is applied exactly once, or its refusal is reported; I2 (incarnation, version)
only grows; I3 nothing is applied that is staler than allowed; I4 in a sync run, the weights are
those of the run without faults; I5 so are the tokens; I6 a checkpoint holds one version, and no
number that is not finite; I7 every call ends with a result or an error of ours in its time; I8
after the last client, nothing is kept.
"""

from typing import Any

import numpy as np

from fedsplit.spec import RunSpec
from fedsplit.trunk.aggregator import oldest
from simulations.schedules.events import Event, digest_of
from simulations.schedules.expected import Checkpoint, Contribution, SessionModel, mean_of
from simulations.schedules.trunk import (
    FIRST,
    Array,
    Values,
    gradients_of,
    input_gradient_of,
    output_of,
    stepped,
)

_ROUNDING = 1e-5


class TrunkModel:
    """Follows the events of a trunk.

    Args:
        run: The run.
        violations: Gets a sentence for each violation.
    """

    def __init__(self, run: RunSpec, violations: list[str]) -> None:
        self.values: dict[int, Values] = {}
        self.version = 0
        self.steps: dict[tuple[str, int], Contribution] = {}
        self.answers: dict[tuple[str, str, int], set[str]] = {}
        self.spoken: dict[tuple[str, int], list[Values]] = {}
        self.may_repeat: set[str] = set()
        self.inputs: dict[tuple[str, int], Array] = {}
        self._run = run
        self._say = violations.append
        self._incarnations: dict[str, Event] = {}
        self._checkpoints: dict[int, Checkpoint] = {}
        self._taken: dict[str, int] = {}
        self._sessions: dict[str, SessionModel] = {}
        self._awaited: set[str] = set()
        self._asked_at: dict[tuple[str, int], int] = {}
        self._last: Event | None = None

    def see(self, event: Event) -> None:
        """Take in an event of the trunk."""
        method = getattr(self, f"_{event.what.replace(' ', '_')}", None)
        if method:
            method(event)
        if event.incarnation:
            self._last = event

    # --- incarnations and checkpoints ---------------------------------------------------------

    def _started(self, event: Event) -> None:
        if before := self._incarnations.get(event.incarnation):
            self._say(
                f"I2: the trunk began again at version {event.version} and did not say so, since "
                f"its incarnation is that of {before}: {event}"
            )
        self._incarnations[event.incarnation] = event
        saved = self._checkpoints.get(event.version)
        values, taken = (saved.values, saved.taken) if saved else (FIRST, {})
        if saved is None and event.version:
            self._say(f"I6: the trunk began with a version that it has not saved: {event}")
        if digest_of(values) != event.digest:
            self._say(
                f"I6: the trunk began with other parameters than those of version {event.version}, "
                f"sha256 {digest_of(values)}: {event}"
            )
        self.values, self.version = {event.version: values}, event.version
        self._taken, self._sessions, self._awaited = dict(taken), {}, set()
        # What is not part of that version is undone, and may be sent again.
        self.steps = {}

    def _saved(self, event: Event) -> None:
        values: Values = event.data
        broken = [name for name, each in values.items() if not np.isfinite(each).all()]
        if broken:
            self._say(f"I6: a checkpoint has numbers in {broken[0]} that are not finite: {event}")
        mine = self.values.get(event.version)
        if event.version != self.version or mine is None:
            self._say(
                f"I6: a checkpoint is of version {event.version}, but the trunk is at "
                f"{self.version}: {event}"
            )
        elif other := [name for name in mine if not np.array_equal(mine[name], values[name])]:
            self._say(
                f"I6: a checkpoint of version {event.version} has {other[0]} of another version, "
                f"so it is of half a step: {event}"
            )
        self._checkpoints[event.version] = Checkpoint(event, values, dict(self._taken_of_applied()))

    def _taken_of_applied(self) -> dict[str, int]:
        taken = dict(self._taken)
        for each in self.steps.values():
            if each.accepted and not each.applied:
                taken[each.client] -= 1
        return taken

    # --- sessions -----------------------------------------------------------------------------

    def _expects(self, event: Event) -> None:
        self._awaited |= set(event.data)

    def _released(self, event: Event) -> None:
        self._awaited.discard(event.client)
        self._require_no_dead_member(event)

    def _was_asked(self, event: Event) -> None:
        if event.kind == "step":
            self._contribute(event)
        elif event.kind == "generate":
            self._asked_at.setdefault((event.session, event.call), self.version)

    def _answered(self, event: Event) -> None:
        if answer := getattr(self, f"_answered_{event.kind}", None):
            answer(event, *event.data)
        key = event.session, event.kind, event.call
        self.answers.setdefault(key, set()).add(f"{event.version} {event.digest}")

    def _answered_open(self, event: Event, request: Any, reply: Any) -> None:
        self._sessions[reply.session] = SessionModel(event.client)
        if request.training:
            self._awaited.add(event.client)
        if event.version != self.version:
            self._say(
                f"I2: the trunk is at version {self.version} and names another one to a client: "
                f"{event}"
            )

    def _answered_close(self, event: Event, request: Any, reply: Any) -> None:
        self._awaited.discard(event.client)
        self._require_no_dead_member(event)

    def _answered_forward(self, event: Event, request: Any, reply: Any) -> None:
        session = self._sessions.get(event.session)
        x_BTD = self.inputs.get((event.session, event.call))
        values = self.values.get(event.version)
        if session is None or x_BTD is None or session.client != event.client:
            self._say(f"I1: a forward of a session that its client has not opened: {event}")
            return
        if values is None:
            self._say(
                f"I2: a reply names version {event.version}, but the trunk is at {self.version}: "
                f"{event}"
            )
            return
        wanted = digest_of(output_of(x_BTD, values))
        if wanted != event.digest:
            self._say(
                f"I1: the reply to {event.client} is not the trunk's output for what it sent, "
                f"which at version {event.version} is sha256 {wanted}: {event}"
            )
        session.forwards[event.call] = x_BTD, event.version

    def _answered_backward(self, event: Event, request: Any, reply: Any) -> None:
        session = self._sessions.get(event.session)
        if session is None or event.call not in session.forwards:
            self._say(f"I1: a backward without a forward was answered: {event}")
            return
        if first := session.backwards.get(event.call):
            if first.digest != event.digest:
                self._say(f"I1: a repeated backward has another reply than {first}: {event}")
            return
        session.backwards[event.call] = event
        x_BTD, version = session.forwards[event.call]
        grad_BTD = request.grad_trunk_out_BTD.numpy()
        values = self.values.get(version)
        if values and digest_of(input_gradient_of(grad_BTD, values)) != event.digest:
            self._say(
                f"I1: the reply to {event.client} is not the gradient of what it sent at version "
                f"{version}: {event}"
            )
        for name, gradient in gradients_of(x_BTD, grad_BTD).items():
            before = session.gradients.get(name)
            session.gradients[name] = gradient if before is None else before + gradient
        session.version = version if session.version < 0 else min(session.version, version)
        norm = sum(
            float((each.astype(np.float64) ** 2).sum()) for each in session.gradients.values()
        )
        if not np.isclose(norm, reply.trunk_sq_norm, rtol=_ROUNDING):
            self._say(
                f"I1: the gradients of the session have the squared norm {norm:.6g}, but the "
                f"trunk has {reply.trunk_sq_norm:.6g}: {event}"
            )

    def _answered_generate(self, event: Event, request: Any, reply: Any) -> None:
        session = self._sessions.get(event.session)
        if session is None:
            self._say(f"I5: a session that is not open was answered: {event}")
            return
        new_BTD = request.smashed_BTD.numpy()
        if session.history is not None and request.past:
            new_BTD = np.concatenate((session.history[:, : request.past], new_BTD), 1)
        session.history = new_BTD
        # Other clients may have stepped while the request waited for its pass.
        first = self._asked_at.get((event.session, event.call), self.version)
        found = [self.values[v] for v in range(first, self.version + 1) if v in self.values]
        tokens = request.logits_to_keep
        past = new_BTD.shape[1] - tokens
        self.spoken.setdefault((event.session, event.call), []).extend(found)
        if event.digest not in {digest_of(output_of(new_BTD, each, past)) for each in found}:
            self._say(
                f"I5: the reply to {event.client} is not the trunk's output for the "
                f"{new_BTD.shape[1]} tokens of its session: {event}"
            )

    # --- steps --------------------------------------------------------------------------------

    def _contribute(self, event: Event) -> None:
        session, request = self._sessions.get(event.session), event.data
        key = event.session, event.call
        if key in self.steps or session is None or not session.gradients:
            return
        self.steps[key] = Contribution(
            event=event,
            client=event.client,
            step=request.step,
            tokens=request.num_tokens,
            version=session.version,
            gradients=session.gradients,
            digest=digest_of(session.gradients),
        )
        session.gradients, session.version = {}, -1

    def _refused(self, event: Event) -> None:
        step = self.steps.get((event.session, event.call)) if event.kind == "step" else None
        if step and not step.accepted:
            step.refused = event

    def _answered_step(self, event: Event, request: Any, reply: Any) -> None:
        step = self.steps.get((event.session, event.call))
        if step is None:
            self._say(f"I1: a step without a gradient was acknowledged: {event}")
            return
        self._accept(step, event)
        if step.reply not in (-1, event.version):
            self._say(
                f"I1: a repeated step has another reply, version {event.version} after version "
                f"{step.reply}: {event}"
            )
        step.reply = event.version
        if step.applied is None and event.version != self.version + 1:
            self._say(
                f"I2: a step was acknowledged for version {event.version}, but the next one is "
                f"{self.version + 1}: {event}"
            )
        self._require_no_dead_member(event)

    def _accept(self, step: Contribution, event: Event) -> None:
        if step.accepted:
            return
        step.accepted = event
        # A contribution that arrives after its client was released counts it in again.
        self._awaited.add(step.client)
        due = self._taken.get(step.client, 0)
        # A client that was killed or gave up cannot know of its last step.
        if step.step > due or (step.step < due and step.client not in self.may_repeat):
            self._say(
                f"I1: {step.client} contributes its step {step.step}, but in this branch of the "
                f"trunk's history its step {due} is the next one; one side alone has gone back, or "
                f"the step was repeated: {step.event}"
            )
        self._taken[step.client] = step.step + 1

    def _applied(self, event: Event) -> None:
        taken, _ = event.data
        found = [step for each in taken if (step := self._of(each, event))]
        for step in found:
            self._accept(step, event)
            step.applied = event
            age, most = self.version - step.version, oldest(self._run.policy)
            if age > most:
                self._say(
                    f"I3: the gradient of {step.client} is {age} versions old and at most {most} "
                    f"are allowed: {step.event}, applied in {event}"
                )
            if step.reply not in (-1, self.version + 1):
                self._say(
                    f"I2: version {self.version + 1} has a gradient that was acknowledged for "
                    f"version {step.reply}: {step.event}, applied in {event}"
                )
        if len(found) < len(taken):
            return
        policy = self._run.policy
        discounts = [policy.discount_of(max(0, self.version - step.version)) for step in found]
        weights = [step.tokens * each for step, each in zip(found, discounts, strict=True)]
        scale = discounts[0] if policy.kind == "async" else 1.0
        mean = mean_of([step.gradients for step in found], [w / sum(weights) for w in weights])
        values = stepped(self.values[self.version], mean, scale)
        self.version += 1
        self.values[self.version] = values
        if digest_of(values) != event.digest:
            self._say(
                f"I1: the gradients of this step give the parameters sha256 {digest_of(values)} "
                f"at version {self.version}, but the trunk has others: {event}"
            )

    def _of(self, taken: tuple[str, int, float, Values], event: Event) -> Contribution | None:
        """Return the contribution that a step has applied."""
        client, _, _, gradients = taken
        digest = digest_of(gradients)
        found = [s for s in self.steps.values() if (s.client, s.digest) == (client, digest)]
        for step in found:
            if not step.applied and not step.refused:
                return step
        if not found:
            self._say(
                f"I1: a gradient of {client} was applied, sha256 {digest}, that is none of what "
                f"it sent: {event}"
            )
        elif found[-1].applied:
            self._say(
                f"I1: a gradient was applied twice: {found[-1].event}, applied in "
                f"{found[-1].applied} and in {event}"
            )
        else:
            self._say(f"I1: a gradient was applied that {found[-1].refused}: {event}")
        return None

    def _require_no_dead_member(self, event: Event) -> None:
        waiting = {
            step.client for step in self.steps.values() if step.accepted and not step.applied
        }
        if self._run.policy.kind == "sync" and waiting and self._awaited <= waiting:
            self._say(
                f"I7: the barrier waits, although each client at work has contributed "
                f"({', '.join(sorted(waiting))}): {event}"
            )

    def end(self, event: Event) -> None:
        """Check that nothing is kept (I8), and that nothing was lost (I1)."""
        for what, number in event.data.items():
            if number:
                self._say(f"I8: after the last client, the trunk keeps {number} {what}: {event}")
        for step in self.steps.values():
            if step.accepted and not step.applied:
                self._say(f"I1: a step was acknowledged and never applied: {step.accepted}")
        if event.version != self.version:
            self._say(f"I2: the trunk has taken {self.version} steps of its clients: {event}")
