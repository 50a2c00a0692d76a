"""Cases for a client: a training step and a generation whose replies are changed on their way.

Shapes: B sequences, T tokens.
"""

import random
from typing import Any, cast

import torch

from fedsplit import errors
from fedsplit.client.remote import RemoteTrunk
from fedsplit.client.trainer import ClientTrainer
from fedsplit.errors import FedsplitError, error_from_code
from fedsplit.link import Link
from fedsplit.model import connect
from fedsplit.transport.frames import CALLS, Reader, to_frames
from fedsplit.wire.messages import R, Reply, Request
from fedsplit.wire.replies import check_reply
from simulations.fuzzing import odd
from simulations.fuzzing.case import Case, Wrong
from simulations.fuzzing.frames import disordered, with_odd_fields
from simulations.fuzzing.samples import mutated
from simulations.fuzzing.stage import ATTACKERS, SHAPE, Stage

_CODES = sorted(
    {error.code for error in vars(errors).values() if isinstance(error, type(FedsplitError))}
    - {errors.ActivationExpired.code}  # a client waits for seconds before it tries again
)


class _Hostile(Link):
    """A link to a trunk that changes some of the replies."""

    def __init__(self, case: Case, stage: Stage, link: Link) -> None:
        self._case = case
        self._stage = stage
        self._link = link
        self._share = case.rng.choice((0.1, 0.3, 1.0))

    def exchange(self, request: Request[R]) -> R:
        """Send a request; return another reply than the trunk's, or raise another error."""
        reply: Any = self._link.exchange(request)
        if self._case.rng.random() < self._share:
            reply = self._changed(reply)
        if isinstance(reply, FedsplitError):
            raise reply
        # As the link over gRPC does, before it checks the values.
        if type(reply) is not CALLS[type(request)].reply:
            raise errors.ProtocolError(f"the trunk answered with a {type(reply).__name__}")
        check_reply(request, reply)
        return cast(R, reply)

    def _changed(self, reply: Reply) -> Any:
        rng = self._case.rng
        match rng.randrange(6):
            case 0:
                retry_after_s = rng.choice((0.0, 1e6, odd.integer(rng) / 1000))
                changed: Any = error_from_code(rng.choice(_CODES), odd.text(rng), retry_after_s)
            case 1:
                changed = self._through_frames(reply)
            case 2:
                changed = self._stage.samples[ATTACKERS[0]].reply(rng)
            case _:
                changed = mutated(reply, rng)
        self._case.sent(changed)
        return changed

    def _through_frames(self, reply: Reply) -> Any:
        rng = self._case.rng
        frames = list(to_frames(reply, chunk_bytes=rng.choice((1 << 20, 256))))
        if rng.random() < 0.5:
            frames[0] = with_odd_fields(rng, frames[0])
        else:
            frames = disordered(rng, frames)
        reader, read = Reader(self._stage.max_bytes), None
        for frame in frames:
            read = reader.feed(frame)
        if read is None:
            raise errors.ConnectionLost("the stream ended in the middle of a message")
        return read

    def close(self) -> None:
        """See `Link`."""


def replies_case(case: Case, stage: Stage) -> None:
    """A client that trains, evaluates or generates; what it returns must be finite."""
    rng, client = case.rng, ATTACKERS[2]
    link = _Hostile(case, stage, stage.link(client))
    model = stage.model()
    try:
        trunk = RemoteTrunk(link, model, stage.run, client=client, kv=_side(rng))
        connect(model, trunk)
        batch = SHAPE.batch()
        trainer = ClientTrainer(model, trunk, stage.run)
        match rng.randrange(4):
            case 0:
                with trunk.session(training=False), torch.no_grad():
                    result = model(**batch.inputs).logits
            case 1:
                prompt_BT = batch.inputs["input_ids"][:1, :3]
                mask_BT = torch.ones_like(prompt_BT)
                result = model.generate(
                    prompt_BT, attention_mask=mask_BT, max_new_tokens=2, do_sample=False
                )
            case _:
                with trunk.session():
                    trainer.step([batch])
                result = torch.cat([each.detach().view(-1) for each in model.parameters()])
    except FedsplitError as error:
        case.got(error)
        return
    case.got(result)
    if not result.isfinite().all():
        raise Wrong("a client took a reply that made its results NaN or Inf")


def _side(rng: random.Random) -> str:
    return rng.choice(("server", "server", "client"))
