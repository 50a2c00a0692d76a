"""Sizes beyond 2^31 bytes: a server that allows them starts, and no frame comes near them."""

from collections.abc import Iterator

import grpc
import pytest
import torch

from fedsplit.errors import TooLarge
from fedsplit.spec import WireSpec
from fedsplit.spec.checks import MAX_SECONDS
from fedsplit.transport import fedsplit_pb2 as pb
from fedsplit.transport.frames import FRAME_BYTES, SERVICE, Reader, to_frame, to_frames
from fedsplit.transport.server import largest_payload
from fedsplit.transport.status import TOKEN_KEY, from_rpc_error
from fedsplit.wire import messages as m
from tests.edge.echo import TOKEN, EchoService, linked, serving

GPU_SIZED = m.Limits(
    max_rows=32,
    max_tokens=4096,
    hidden_size=4096,
    session_tokens=1 << 20,
    stateless_bytes=1 << 40,
)
INFO = m.ServiceInfoRequest()


def hidden(tokens: int) -> m.ForwardRequest:
    smashed_BTD = torch.arange(tokens * 4096.0).view(1, tokens, 4096)
    return m.ForwardRequest(session="s1", call=0, training=True, smashed_BTD=smashed_BTD)


class LargeGradients(EchoService):
    def GradientsRequest(self, request: m.GradientsRequest) -> m.GradientsReply:
        return m.GradientsReply(norms={}, names=("w",), gradients=(torch.ones(FRAME_BYTES // 4),))


@pytest.fixture
def address() -> Iterator[str]:
    with serving(LargeGradients(GPU_SIZED)) as where:
        yield where


@pytest.mark.parametrize(
    "wire",
    [WireSpec(), WireSpec(up="bf16", down="bf16", history_bytes=1 << 40)],
    ids=["plain", "with bases"],
)
def test_a_server_of_gpu_sized_batches_starts_and_answers(wire: WireSpec) -> None:
    assert largest_payload(GPU_SIZED) > 1 << 31
    with serving(EchoService(GPU_SIZED), wire) as where, linked(where) as link:
        request = hidden(tokens=2 * FRAME_BYTES // (4 * 4096))
        assert link.exchange(request).trunk_out_BTD.equal(request.smashed_BTD)
        assert link.exchange(INFO).limits == GPU_SIZED


def test_a_longer_request_in_a_unary_call_is_refused(address: str) -> None:
    frame = b"".join([next(to_frames(hidden(1))), bytes(FRAME_BYTES)])
    with grpc.insecure_channel(address) as channel:
        compute = channel.unary_unary(f"/{SERVICE}/Compute", bytes, bytes)
        with pytest.raises(grpc.RpcError) as caught:
            compute(frame, metadata=((TOKEN_KEY, TOKEN),))
        assert from_rpc_error(caught.value, address, 1.0).code == "TOO_LARGE"
        assert compute(to_frame(hidden(1)), metadata=((TOKEN_KEY, TOKEN),))


def test_a_longer_reply_travels_on_the_stream_only(address: str) -> None:
    request = m.GradientsRequest(session="s1", tensors=True)
    with linked(address) as link:
        assert link.exchange(request).gradients[0].nbytes == FRAME_BYTES
    with grpc.insecure_channel(address) as channel:
        gradients = channel.unary_unary(f"/{SERVICE}/GetGradients", bytes, bytes)
        with pytest.raises(grpc.RpcError) as caught:
            gradients(to_frame(request), metadata=((TOKEN_KEY, TOKEN),))
    error = from_rpc_error(caught.value, address, 1.0)
    assert isinstance(error, TooLarge)
    assert str(error) == (
        f"a GradientsReply of more than {FRAME_BYTES} bytes does not fit into one frame; "
        "ask for it over Exchange"
    )


def test_a_payload_beyond_2_to_the_31_is_announced_and_checked() -> None:
    num_bytes = (1 << 31) + 8  # of which no page is touched
    mask = torch.empty(num_bytes, dtype=torch.bool)
    first = next(to_frames(m.GradientsReply(norms={}, names=("w",), gradients=(mask,))))
    assert pb.Frame.FromString(first).header.payload_bytes == num_bytes
    assert Reader(num_bytes).feed(first) is None
    with pytest.raises(TooLarge, match=f"carries {num_bytes} bytes; at most {num_bytes - 1} are"):
        Reader(num_bytes - 1).feed(first)


def test_the_longest_deadline_is_one_that_a_link_can_wait_for(address: str) -> None:
    with linked(address, deadline_s=MAX_SECONDS) as link:
        assert link.exchange(INFO).limits == GPU_SIZED
        assert link.exchange(hidden(1)).version == 0


def test_counts_beyond_2_to_the_53_arrive_exactly() -> None:
    step = m.StepRequest(
        session="s", call=(1 << 64) - 1, step=(1 << 53) + 1, num_tokens=1 << 63, client_sq_norm=0.0
    )
    assert Reader(0).only(to_frame(step)) == step
