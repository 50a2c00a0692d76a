"""What a stranger may send: each wrong frame is one coded error, and the others are served on."""

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import grpc
import pytest
import torch

from fedsplit.errors import FedsplitError, Internal, Overloaded, StaleVersion, TooLarge
from fedsplit.transport import fedsplit_pb2 as pb
from fedsplit.transport.frames import FRAME_BYTES, SERVICE, Reader, to_frame, to_frames
from fedsplit.transport.server import largest_payload
from fedsplit.transport.status import TOKEN_KEY, from_rpc_error
from fedsplit.wire import messages as m
from tests.edge.echo import LIMITS, TOKEN, EchoService, forward, linked, serving

Edit = Callable[[pb.Frame], object]
METADATA = ((TOKEN_KEY, TOKEN),)
GOOD = to_frame(forward())
LONG = list(to_frames(forward(tokens=8), chunk_bytes=1024))


@pytest.fixture(scope="module")
def address() -> Iterator[str]:
    with serving(EchoService(), max_clients=4) as where:
        yield where


@pytest.fixture(autouse=True)
def others(address: str) -> Iterator[None]:
    """Another client, whose stream was open before and is served on after."""
    with linked(address) as link:
        link.exchange(forward())
        yield
        assert link.exchange(forward(call=1)).version == 1


def edited(edit: Edit) -> bytes:
    frame = pb.Frame.FromString(GOOD)
    edit(frame)
    return frame.SerializeToString()


def smashed(frame: pb.Frame) -> pb.TensorMeta:
    return frame.header.forward_request.smashed_BTD


def shaped(*shape: int, nbytes: int = 2048) -> bytes:
    def edit(frame: pb.Frame) -> None:
        smashed(frame).shape[:] = shape
        smashed(frame).nbytes = frame.header.payload_bytes = nbytes

    return edited(edit)


def compressed(*shape: int, nbytes: int, codec: int = 5) -> bytes:
    def edit(frame: pb.Frame) -> None:
        smashed(frame).shape[:] = shape
        smashed(frame).codec, smashed(frame).nbytes = codec, nbytes
        frame.header.payload_bytes = nbytes + -nbytes % 8
        frame.payload = bytes(min(frame.header.payload_bytes, 4096))

    return edited(edit)


def stream(address: str, frames: list[bytes]) -> FedsplitError:
    """How the server ends a stream of these frames."""
    with grpc.insecure_channel(address) as channel:
        exchange = channel.stream_stream(f"/{SERVICE}/Exchange", bytes, bytes)
        replies = exchange(iter(frames), metadata=METADATA)
        with pytest.raises(grpc.RpcError) as caught:
            list(replies)
    return from_rpc_error(caught.value, address, 1.0)


def unary(address: str, frame: bytes, method: str = "Compute", **options: Any) -> FedsplitError:
    """How the server answers this frame in a unary call."""
    with grpc.insecure_channel(address) as channel:
        call = channel.unary_unary(f"/{SERVICE}/{method}", bytes, bytes)
        with pytest.raises(grpc.RpcError) as caught:
            call(frame, **{"metadata": METADATA, **options})
    return from_rpc_error(caught.value, address, 1.0)


FRAMES = {
    "empty": (b"", "PROTOCOL", "a frame came without a message"),
    "garbage": (b"\xff" * 100, "PROTOCOL", "100 bytes came that are not a frame"),
    "text": (b"GET / HTTP/1.1\r\n\r\n", "PROTOCOL", "not a frame"),
    "garbage in header": (b"\x0a\x03\xff\xff\xff", "PROTOCOL", "not a frame"),
    "endless length": (b"\x0a" + b"\xff" * 20, "PROTOCOL", "not a frame"),
    "cut short": (GOOD[:-5], "PROTOCOL", "not a frame"),
    "no header": (edited(lambda f: f.ClearField("header")), "PROTOCOL", "without a message"),
    "unknown body": (b"\x0a\x04\xda\x06\x01\x01", "PROTOCOL", "without a message"),
    "a name that is no text": (b"\x0a\x05\x1a\x03\x0a\x01\xff", "PROTOCOL", "not a frame"),
    "no tensor": (
        edited(lambda f: f.header.forward_request.ClearField("smashed_BTD")),
        "BAD_TENSOR",
        "came without its smashed_BTD",
    ),
    "no dtype": (edited(lambda f: smashed(f).ClearField("dtype")), "BAD_TENSOR", "unspecified"),
    "unknown dtype": (edited(lambda f: setattr(smashed(f), "dtype", 99)), "BAD_TENSOR", "'99'"),
    "unknown codec": (edited(lambda f: setattr(smashed(f), "codec", 9)), "BAD_TENSOR", "codec '9'"),
    "rank 0": (shaped(), "BAD_TENSOR", "rank 0"),
    "rank 5": (shaped(1, 1, 1, 4, 128), "BAD_TENSOR", "rank 5"),
    "an empty dimension": (shaped(1, 0, 128), "BAD_TENSOR", "empty dimension"),
    "a shape that overflows": (shaped(1 << 32, 1 << 32, 1, 1), "BAD_TENSOR", "takes 73786976"),
    "a wrong length": (shaped(1, 4, 128, nbytes=2044), "BAD_TENSOR", "takes 2048 bytes, but 2044"),
    "a codec's wrong length": (
        compressed(1, 4, 128, nbytes=2048, codec=3),
        "BAD_TENSOR",
        "a row of 128 values takes 130 bytes, not 512",
    ),
    "no places": (
        compressed(1, 4, 128, nbytes=4 * 31),
        "BAD_TENSOR",
        "does not mark 13 of its 128",
    ),
    "a bomb": (compressed(2, 1 << 20, nbytes=262150), "TOO_LARGE", "carries 8388608 bytes; at"),
    "codes that no stream is": (
        compressed(1, 4, 128, nbytes=256, codec=7),
        "BAD_TENSOR",
        "no Huffman",
    ),
    "a bomb of codes": (
        compressed(2, 1 << 20, nbytes=800_000, codec=7),
        "TOO_LARGE",
        "carries 8388608",
    ),
    "an absurd size": (shaped(1 << 20, 1 << 20, nbytes=1 << 42), "TOO_LARGE", "at most"),
    "a wrong total": (
        edited(lambda f: setattr(f.header, "payload_bytes", 4096)),
        "BAD_TENSOR",
        "announces 4096 bytes of payload, but its tensors take 2048",
    ),
    "too much payload": (
        edited(lambda f: setattr(f, "payload", f.payload + b"12345678")),
        "BAD_TENSOR",
        "bytes 0 to 2056 does not continue",
    ),
}


@pytest.mark.parametrize(("frame", "code", "text"), FRAMES.values(), ids=FRAMES)
def test_a_wrong_frame_on_the_stream(frame: bytes, code: str, text: str, address: str) -> None:
    error = stream(address, [frame])
    assert error.code == code, error
    assert text in str(error)


@pytest.mark.parametrize(("frame", "code", "text"), FRAMES.values(), ids=FRAMES)
def test_a_wrong_frame_in_a_unary_call(frame: bytes, code: str, text: str, address: str) -> None:
    error = unary(address, frame)
    assert error.code == code, error
    assert text in str(error)


@pytest.mark.parametrize(
    "body", [StaleVersion("no"), m.StepReply(version=1)], ids=["error", "reply"]
)
def test_what_is_no_request_is_answered_and_the_stream_goes_on(body: Any, address: str) -> None:
    assert unary(address, to_frame(body)).code == "PROTOCOL"
    with grpc.insecure_channel(address) as channel:
        exchange = channel.stream_stream(f"/{SERVICE}/Exchange", bytes, bytes)
        told, good = exchange(iter([to_frame(body), GOOD]), metadata=METADATA)
    assert pb.Frame.FromString(told).header.error.code == "PROTOCOL"
    assert pb.Frame.FromString(good).header.HasField("forward_reply")


@pytest.mark.parametrize(
    ("frames", "text"),
    [
        pytest.param([LONG[1]], "a chunk came without a message", id="chunk first"),
        pytest.param([LONG[0], LONG[2]], "bytes 2048 to 3072 does not continue", id="gap"),
        pytest.param(
            [*LONG[:2], LONG[1]], "of which 2048 of 4096 bytes were received", id="overlap"
        ),
        pytest.param([LONG[0], GOOD], "a new message came before the end of", id="interleaved"),
        pytest.param([*LONG, LONG[3]], "a chunk came without a message", id="one too many"),
        pytest.param(
            [LONG[0], to_frame(StaleVersion("no"))], "before the end of", id="error inside"
        ),
        pytest.param(
            [LONG[0], pb.Frame(header={"chunk": {"offset": 1024}}).SerializeToString()],
            "bytes 1024 to 1024 does not continue",
            id="empty chunk",
        ),
    ],
)
def test_chunks_that_do_not_fit(frames: list[bytes], text: str, address: str) -> None:
    assert text in str(stream(address, frames))


def test_a_frame_longer_than_the_longest_legal_one_is_refused(address: str) -> None:
    error = unary(address, bytes(FRAME_BYTES + 1))
    assert error.code == "TOO_LARGE"
    assert "larger than" in str(error)


def test_tensors_larger_than_agreed_are_refused(address: str) -> None:
    smashed_BTD = torch.zeros(9, 1, 128)
    request = m.ForwardRequest(session="s", call=0, training=True, smashed_BTD=smashed_BTD)
    assert unary(address, to_frame(request)).code == "TOO_LARGE"


def test_half_a_unary_message_is_refused(address: str) -> None:
    assert "short" in str(unary(address, LONG[0]))


def test_a_request_at_the_wrong_method_is_refused(address: str) -> None:
    error = unary(address, GOOD, method="Step")
    assert (error.code, str(error)) == ("PROTOCOL", "Step takes a StepRequest")


def test_an_unknown_method_is_another_protocol(address: str) -> None:
    error = unary(address, GOOD, method="Format")
    assert error.code == "PROTOCOL_VERSION"
    assert "does not offer fedsplit.v1.ComputeService" in str(error)


def test_a_stranger_who_leaves_in_the_middle_of_a_message(address: str) -> None:
    with grpc.insecure_channel(address) as channel:
        exchange = channel.stream_stream(f"/{SERVICE}/Exchange", bytes, bytes)
        assert list(exchange(iter(LONG[:2]), metadata=METADATA)) == []


def test_too_much_metadata_is_refused(address: str) -> None:
    error = unary(address, GOOD, metadata=((TOKEN_KEY, "x" * 40000),))
    assert error.code == "TOO_LARGE"
    assert "metadata size exceeds" in str(error)


# --- a hostile server ------------------------------------------------------------------------


@contextmanager
def answering(*frames: bytes, **trailing: str) -> Iterator[str]:
    """The address of a server that answers every stream alike, and ends it if it says why."""

    def exchange(requests: Iterator[bytes], context: grpc.ServicerContext) -> Iterator[bytes]:
        for _ in requests:
            yield from frames
            if trailing:
                told = {f"fedsplit-{key.replace('_', '-')}": text for key, text in trailing.items()}
                context.set_trailing_metadata(tuple(told.items()))
                context.abort(grpc.StatusCode.UNKNOWN, "no")

    server = grpc.server(ThreadPoolExecutor(2))
    methods = {"Exchange": grpc.stream_stream_rpc_method_handler(exchange)}
    server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(SERVICE, methods),))
    port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    try:
        yield f"127.0.0.1:{port}"
    finally:
        server.stop(0).wait()


@pytest.mark.parametrize(
    ("frames", "code", "text"),
    [
        pytest.param([b"\xff" * 9], "PROTOCOL", "9 bytes came that are not a frame", id="garbage"),
        pytest.param([GOOD], "PROTOCOL", "with a ForwardRequest", id="a request"),
        pytest.param([LONG[1]], "PROTOCOL", "a chunk came without", id="a chunk"),
        pytest.param([shaped(1 << 20, 1 << 20, nbytes=1 << 42)], "TOO_LARGE", "at most", id="size"),
        pytest.param(
            [to_frame(m.ForwardReply(trunk_out_BTD=torch.zeros(2, 2, 128), version=0))],
            "BAD_TENSOR",
            "answered trunk_out float32 (2, 2, 128) to a request of float32 (1, 4, 128)",
            id="shape",
        ),
        pytest.param([bytes(5 << 20)], "TOO_LARGE", "larger than", id="message"),
    ],
)
def test_a_client_refuses_wrong_bytes_of_its_server(
    frames: list[bytes], code: str, text: str
) -> None:
    with answering(*frames) as where, linked(where) as link:
        for _ in range(2):
            with pytest.raises(FedsplitError) as caught:
                link.exchange(forward())
            assert caught.value.code == code, caught.value
            assert text in str(caught.value)


@pytest.mark.parametrize(("wait", "seconds"), [("250", 0.25), ("-9e99", 0.0), ("", 0.0)])
def test_a_client_takes_no_wrong_retry_time(wait: str, seconds: float) -> None:
    with answering(code="OVERLOADED", retry_after_ms=wait) as where, linked(where) as link:
        with pytest.raises(Overloaded) as caught:
            link.exchange(forward())
    assert caught.value.retry_after_s == seconds


def test_an_unknown_code_of_a_server_is_internal() -> None:
    with answering(code="NEW", detail="something new") as where, linked(where) as link:
        with pytest.raises(Internal, match="something new"):
            link.exchange(forward())


def test_the_largest_forward_with_all_that_it_goes_by_is_taken() -> None:
    limits = replace(LIMITS, session_tokens=1, stateless_bytes=1)
    whole = forward(limits.max_tokens)
    rows_BTD = whole.smashed_BTD.expand(limits.max_rows, -1, -1).contiguous()
    ones_BT = torch.ones(rows_BTD.shape[:2], dtype=torch.int64)
    request = replace(
        whole,
        smashed_BTD=rows_BTD,
        attention_mask_BT=ones_BT,
        position_ids_BT=ones_BT,
        bases_B=ones_BT[:, 0],
        references=(rows_BTD.bfloat16(), rows_BTD.bfloat16()),
    )
    first, *others = to_frames(request)
    reader = Reader(largest_payload(limits, with_bases=True))
    assert [reader.feed(frame) is None for frame in (first, *others)][-2:] == [True, False]
    with pytest.raises(TooLarge):
        Reader(largest_payload(limits)).feed(first)
