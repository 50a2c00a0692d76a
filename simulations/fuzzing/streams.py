"""Cases for a server: streams in disorder, cut off or left, and calls with odd bodies or tokens."""

from fedsplit.errors import DeadlineExceeded, FedsplitError, Internal
from fedsplit.transport.frames import CALLS, to_frames
from fedsplit.wire.messages import Reply
from simulations.fuzzing import odd
from simulations.fuzzing.case import Case, Wrong
from simulations.fuzzing.frames import disordered, with_odd_fields
from simulations.fuzzing.stage import ATTACKERS, Stage


def streams_case(case: Case, stage: Stage) -> None:
    """Requests of one client on one stream or in a call, as frames in disorder."""
    rng = case.rng
    client = rng.choice(ATTACKERS)
    frames: list[bytes] = []
    for number in range(rng.randint(1, 4)):
        session = stage.session(client, rng.randrange(3))
        request = stage.samples[client].request(rng, session, 4 * case.number + number)
        frames += to_frames(request, chunk_bytes=rng.choice((1 << 20, 64, 512)))
    if rng.random() < 0.7:
        frames = disordered(rng, frames)
    if rng.random() < 0.2:
        frames = [*frames, odd.damaged(rng, frames[-1])]
    if rng.random() < 0.3:
        frames = [_with_odd_fields(case, frame) for frame in frames]
    is_stream = rng.random() < 0.7
    method = "Exchange" if is_stream else rng.choice([each.method for each in CALLS.values()])
    token = stage.tokens[client] if rng.random() < 0.95 else rng.choice(("", "wrong"))
    case.sent((method, frames))
    leave_after = rng.choice((0, 1)) if rng.random() < 0.2 else -1
    for answer in stage.caller.call(method, frames, token, leave_after):
        case.got(answer)
        if isinstance(answer, Internal | DeadlineExceeded):
            raise Wrong(f"the server answered {answer.code}: {answer}")
        if not isinstance(answer, Reply | FedsplitError):
            raise Wrong(f"the server answered with a {type(answer).__name__}")


def _with_odd_fields(case: Case, frame: bytes) -> bytes:
    try:
        return with_odd_fields(case.rng, frame)
    except FedsplitError:  # it was damaged before, and is no frame any more
        return frame
