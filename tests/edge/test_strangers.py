"""Attacks on a server's slots, memory and threads; an honest client beside gets the same bits."""

import math
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import grpc
import pytest
import torch
from grpc_health.v1 import health_pb2, health_pb2_grpc

from fedsplit.errors import (
    ConfigError,
    DeadlineExceeded,
    FedsplitError,
    Overloaded,
    TooLarge,
    Unauthenticated,
)
from fedsplit.spec import LimitsSpec, WireSpec
from fedsplit.transport import fedsplit_pb2 as pb
from fedsplit.transport.calls import STRANGERS
from fedsplit.transport.client import GrpcLink
from fedsplit.transport.frames import CALLS, FRAME_BYTES, HEADER_BYTES, SERVICE, to_frame, to_frames
from fedsplit.transport.server import GrpcServer
from fedsplit.transport.slots import Slot, Slots
from fedsplit.transport.status import TOKEN_KEY, from_rpc_error
from fedsplit.wire import messages as m
from fedsplit.wire.codec import decode_tensor, encode_tensor
from tests.edge.echo import LIMITS, EchoService, forward, linked

INFO = m.ServiceInfoRequest()
WITH_A_TOKEN = [call.method for call in CALLS.values() if call.method != "GetServiceInfo"]


class TokenService(EchoService):
    """An echo for clients that each have a token: "token of ann" is that of ann."""

    def check_token(self, token: str) -> str:
        if not token.startswith("token of "):
            raise Unauthenticated("the token is wrong")
        return token.removeprefix("token of ")

    def handle(self, request: Any, token: str) -> Any:
        if isinstance(request, m.ServiceInfoRequest):
            return self.ServiceInfoRequest(request)
        self.check_token(token)
        return super().handle(request, token)


class Shared(TokenService):
    """An echo whose clients share a token, so that it cannot tell them apart."""

    def check_token(self, token: str) -> str:
        super().check_token(token)
        return ""


class Here:
    """A server of a service, with an attacker's channel and an honest client."""

    def __init__(self, service: EchoService, **budgets: Any) -> None:
        self.service = service
        self.budgets = LimitsSpec(**{"body_s": 0.4, "streams_per_client": 3, **budgets})
        self.open = ExitStack()
        self.attacks: list[Attack] = []  # gRPC ends a call that nobody refers to

    def __enter__(self) -> "Here":
        self.server = GrpcServer(
            self.service, wire=WireSpec(), limits=LIMITS, max_clients=6, budgets=self.budgets
        )
        self.address = self.server.start()
        self.open.callback(self.server.stop)
        self.open.callback(self.service.gate.set)
        self.channel = self.open.enter_context(grpc.insecure_channel(self.address))
        return self

    def __exit__(self, *_: object) -> None:
        self.open.close()

    def honest(self, name: str = "ann") -> GrpcLink:
        return self.open.enter_context(linked(self.address, token=f"token of {name}"))

    def attack(self, method: str, frames: list[bytes], token: str = "") -> "Attack":
        """A call that sends these frames, and then neither sends nor ends."""
        call = self.channel.stream_stream(f"/{SERVICE}/{method}", bytes, bytes)
        silence = threading.Event()
        self.open.callback(silence.set)

        def sent() -> Iterator[bytes]:
            yield from frames
            silence.wait()

        self.attacks.append(Attack(call(sent(), metadata=((TOKEN_KEY, token),)), self.address))
        return self.attacks[-1]


class Attack:
    def __init__(self, call: Any, address: str) -> None:
        self.call, self.address = call, address

    def ended(self) -> FedsplitError:
        """The error that the server ended the call with."""
        with pytest.raises(grpc.RpcError) as caught:
            list(self.call)
        return from_rpc_error(caught.value, self.address, 1.0)


@pytest.fixture
def here() -> Iterator[Here]:
    with Here(TokenService()) as opened:
        yield opened


@contextmanager
def unharmed(here: Here, name: str = "ann") -> Iterator[GrpcLink]:
    """A block beside which an honest client gets the same bits as before it."""
    link = here.honest(name)
    before = link.exchange(forward()).trunk_out_BTD
    yield link
    for call in range(3):
        assert link.exchange(forward(call=call)).trunk_out_BTD.equal(before)
        assert link.exchange(INFO).family == "echo"


def eventually(holds: Callable[[], bool]) -> None:
    """Wait until it holds."""
    for _ in range(200):
        if holds():
            return
        time.sleep(0.05)
    pytest.fail("it did not come to hold")


# --- without a token -------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["Exchange", *WITH_A_TOKEN])
def test_calls_without_a_token_whose_body_never_comes_are_refused_at_once(
    method: str, here: Here
) -> None:
    with unharmed(here):
        attacks = [here.attack(method, []) for _ in range(20)]
        assert {attack.ended().code for attack in attacks} == {"UNAUTHENTICATED"}
        assert here.server.usage == {"streams": 1, "calls": 0, "calls without a token": 0}


def test_calls_that_need_no_token_and_have_no_body_share_a_few_slots(here: Here) -> None:
    with unharmed(here) as link:
        attacks = [here.attack("GetServiceInfo", []) for _ in range(3 * STRANGERS)]
        eventually(lambda: here.server.usage["calls without a token"] == STRANGERS)
        assert link.exchange(INFO).family == "echo"
        with linked(here.address, token="") as another:
            assert another.exchange(INFO).family == "echo"
        with grpc.insecure_channel(here.address) as channel:
            check = health_pb2_grpc.HealthStub(channel).Check
            assert check(health_pb2.HealthCheckRequest()).status == 1
        codes = [attack.ended().code for attack in attacks]
        assert codes.count("DEADLINE") <= STRANGERS
        assert set(codes) == {"DEADLINE", "OVERLOADED"}
        assert here.server.usage["calls without a token"] == 0


def test_tensors_to_a_method_without_a_token_are_not_decoded(here: Here) -> None:
    assert here.attack("GetServiceInfo", [to_frame(forward())]).ended().code == "TOO_LARGE", (
        "no payload is allowed"
    )


def test_a_header_of_empty_messages_is_not_parsed(here: Here) -> None:
    empty = b"\x4a\x00"  # an empty TensorMeta in `references`, which takes 30 times its bytes
    body = empty * (FRAME_BYTES // 4)
    header = b"\x1a" + varint(len(body)) + body
    frame = b"\x0a" + varint(len(header)) + header
    with unharmed(here):
        error = here.attack("Exchange", [frame], "token of eve").ended()
    assert error.code == "TOO_LARGE"
    assert f"at most {HEADER_BYTES} are allowed" in str(error)


def varint(value: int) -> bytes:
    septets = [value >> shift & 0x7F for shift in range(0, max(1, value.bit_length()), 7)]
    return bytes([septet | 0x80 for septet in septets[:-1]] + septets[-1:])


def test_a_frame_of_many_fields_is_not_parsed(here: Here) -> None:
    frame = b"\x18\x00" * (FRAME_BYTES // 4)
    assert here.attack("Exchange", [frame], "token of eve").ended().code == "PROTOCOL"


def test_the_header_of_the_largest_model_is_read() -> None:
    meta = pb.TensorMeta(dtype=2, shape=[64, 128, 8192, 256], nbytes=1 << 40)
    entries = [pb.KVCacheEntry(block=n, keys_BHTE=meta, values_BHTE=meta) for n in range(1000)]
    request = pb.GenerateRequest(session="s" * 32, entries=entries)
    assert len(request.SerializeToString()) < HEADER_BYTES / 2


def test_a_body_that_grpc_would_inflate_is_refused(here: Here) -> None:
    call = here.channel.unary_unary(f"/{SERVICE}/GetServiceInfo", bytes, bytes)
    with unharmed(here), pytest.raises(grpc.RpcError) as caught:
        call(bytes(64 << 20), compression=grpc.Compression.Gzip)
    assert caught.value.code() is grpc.StatusCode.UNIMPLEMENTED
    assert "gzip" in caught.value.details()


# --- with a token ----------------------------------------------------------------------------


@pytest.mark.parametrize("service", [TokenService, Shared])
def test_silent_streams_give_way(service: type[EchoService]) -> None:
    with Here(service(), body_s=5.0) as here, unharmed(here):
        attacks = [here.attack("Exchange", [], "token of eve") for _ in range(30)]
        eventually(lambda: here.server.usage["streams"] in (4, 6))
        with unharmed(here, "bob"), unharmed(here, "cem"):
            pass
        ended = [attack for attack in attacks if not attack.call.is_active()]
        assert len(ended) >= 24
        assert {attack.ended().code for attack in ended} == {"OVERLOADED"}


def test_a_stream_that_says_nothing_is_ended(here: Here) -> None:
    with unharmed(here):
        error = here.attack("Exchange", [], "token of eve").ended()
    assert isinstance(error, DeadlineExceeded)
    assert "nothing came for 0.4 s (limits.body_s)" in str(error)


@pytest.mark.parametrize("method", ["Exchange", "Compute"])
def test_half_a_body_is_waited_for_no_longer_than_the_limit(method: str, here: Here) -> None:
    start = next(to_frames(forward(tokens=8), chunk_bytes=1024))
    frames = [start] if method == "Exchange" else []
    with unharmed(here):
        error = here.attack(method, frames, "token of eve").ended()
        assert "(limits.body_s)" in str(error)
    assert here.server.usage["calls"] == 0


def test_calls_of_one_client_leave_the_slots_of_others(here: Here) -> None:
    here.service.gate.clear()
    step = to_frame(m.StepRequest(session="s", call=0, step=0, num_tokens=1, client_sq_norm=0.0))
    attacks = [here.attack("Step", [step], "token of eve") for _ in range(20)]
    over = len(attacks) - here.budgets.calls_per_client
    eventually(lambda: sum(not attack.call.is_active() for attack in attacks) == over)
    refused = [attack.ended() for attack in attacks if not attack.call.is_active()]
    assert {error.code for error in refused} == {"OVERLOADED"}
    assert all("client eve has 8 calls, which is the most" in str(error) for error in refused)
    assert all(error.retry_after_s == 1.0 for error in refused)
    here.service.gate.set()
    with unharmed(here):
        pass


def test_an_idle_stream_is_ended_and_its_client_notices_nothing() -> None:
    with Here(TokenService(), idle_s=0.3) as here:
        link = here.honest()
        link.exchange(forward(session="s7"))
        stream = link.stream()
        assert here.service.gone(1) == ["s7"]
        eventually(lambda: link.stream() is not stream)
        assert link.exchange(forward(call=1)).version == 1


def test_a_stream_whose_request_is_in_work_is_not_idle() -> None:
    with Here(TokenService(), idle_s=0.2, body_s=0.2) as here:
        here.service.gate.clear()
        answer = here.honest().stream().begin(forward(call=5))
        late = here.attack("Exchange", [], "token of eve").ended()
        assert here.attack("Exchange", [], "token of eve").ended().code == late.code
        here.service.gate.set()
        assert answer().version == 5


def test_a_client_that_takes_no_reply_is_ended() -> None:
    with Here(TokenService(), idle_s=0.3) as here:
        long = [frame for call in range(20) for frame in to_frames(forward(1024, call=call))]
        here.attack("Exchange", long, "token of eve")
        eventually(lambda: len(here.service.handled) > 4)
        eventually(lambda: here.server.usage["streams"] == 0)
        with unharmed(here):
            pass


def test_the_slots_in_use_are_told_with_the_budgets_of_the_service() -> None:
    class Told(TokenService):
        def ServiceInfoRequest(self, request: m.ServiceInfoRequest) -> m.ServiceInfoReply:
            return replace(
                super().ServiceInfoRequest(request), budgets={"limits.clients": "1 of 9"}
            )

    with Here(Told(), body_s=5.0) as here:
        here.attack("Exchange", [], "token of eve")
        eventually(lambda: here.server.usage["streams"] == 1)
        told = here.honest().exchange(INFO).budgets
    assert told["limits.clients"] == "1 of 9"
    assert {"1 of 6", "1 of 14"} < {*told.values()}
    assert told["limits.idle_s"] == "0 of 600"
    # At least the token and the name of its key.
    most, _, limit = told["limits.metadata_bytes"].partition(" of ")
    assert limit == "16384" and len(TOKEN_KEY + "token of ann") <= int(most) < 1000


def test_more_metadata_than_the_limit_is_refused() -> None:
    with Here(TokenService(), metadata_bytes=2000) as here:
        with linked(here.address, token="token of " + "x" * 2000) as link:
            with pytest.raises(TooLarge, match="metadata size exceeds"):
                link.exchange(INFO)
        with unharmed(here):
            pass


def test_many_callers_take_few_threads() -> None:
    with Here(Shared()) as here:
        before = threading.active_count()
        for number in range(60):
            with linked(here.address, token="token of eve") as link:
                opened = m.OpenRequest(
                    protocol=1,
                    client=f"eve{number}",
                    model="m",
                    config="f",
                    hidden_size=128,
                    round=0,
                    training=True,
                )
                link.exchange(opened)
                link.exchange(forward(session=f"eve{number}"))
        names = [each.name for each in threading.enumerate()]
        assert sum(name == "fedsplit-timer" for name in names) == 1
        assert threading.active_count() - before <= 16, names


# --- slots, on a clock -----------------------------------------------------------------------


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


def test_the_longest_silence_gives_way_first_and_work_never() -> None:
    clock, ended = Clock(), []
    slots = Slots("streams", total=3, per_client=2, settled_s=10.0, clock=clock)

    def entered(client: str, *, settled: bool = False) -> Slot:
        slot = Slot(client=client, end=lambda error: ended.append((client, error)))
        slots.enter(slot)
        slot.settled = settled
        slots.await_peer(slot, 60.0, "limits.idle_s")
        clock.now += 1.0
        return slot

    ann = entered("ann", settled=True)
    bob, eve = entered("bob"), entered("eve")
    cem = entered("cem")  # bob was never answered
    assert [client for client, _ in ended] == ["bob"]
    with pytest.raises(Overloaded):
        slots.await_peer(bob, 1.0, "limits.idle_s")
    slots.work(eve)
    slots.work(cem)
    with pytest.raises(Overloaded, match="the server has 3 streams, which is the most"):
        entered("dan")
    clock.now += 10.0
    assert slots.longest_silence("limits.idle_s") == 14.0
    assert slots.longest_silence("limits.body_s") == 0.0
    entered("dan")
    assert [client for client, _ in ended] == ["bob", "ann"]
    slots.leave(ann)
    slots.leave(cem)
    entered("dan")
    entered("dan")
    assert [client for client, _ in ended] == ["bob", "ann", "dan"]
    clock.now += 100.0
    slots.expire()
    assert [client for client, _ in ended] == ["bob", "ann", "dan", "dan", "dan"]
    assert len(slots) == 1
    assert math.isinf(eve.due)
    assert slots.longest_silence("limits.idle_s") == 0.0


# --- sizes and ports --------------------------------------------------------------------------


def peak_mib() -> float:
    """The most memory of this process since `reset_peak`."""
    return int(Path("/proc/self/status").read_text().split("VmHWM:")[1].split()[0]) / 1024


@pytest.mark.parametrize(
    "codec", ["bf16", "int8", "int4", "topk:0.1", "huffman:0.5", "lowrank:0.5"]
)
def test_decoding_takes_no_more_than_the_bytes_and_the_tensor(codec: str) -> None:
    rows_ND = torch.randn(64, 1024).repeat(256, 1)
    meta, raw = encode_tensor(rows_ND, codec)
    data = bytearray(raw)
    Path("/proc/self/clear_refs").write_text("5")
    before = peak_mib()
    decoded_ND = decode_tensor(meta, data)
    assert decoded_ND.shape == rows_ND.shape
    assert peak_mib() - before <= 1.5 * decoded_ND.nbytes / (1 << 20)


@pytest.mark.parametrize("rows", [1, 3, 257])
@pytest.mark.parametrize(
    "codec", ["bf16", "fp16", "int8", "int4", "topk:0.1", "huffman:0.5", "lowrank:0.5"]
)
def test_pieces_of_rows_decode_to_the_bits_of_the_rows(codec: str, rows: int) -> None:
    rows_ND = torch.randn(rows, 1027)
    meta, raw = encode_tensor(rows_ND, codec)
    whole_ND = decode_tensor(meta, bytearray(raw))
    assert (whole_ND - rows_ND).abs().max() < rows_ND.abs().max()
    if codec not in ("topk:0.1", "huffman:0.5", "lowrank:0.5"):
        for row_D, decoded_D in zip(rows_ND, whole_ND, strict=True):
            alone, raw_row = encode_tensor(row_D[None], codec)
            assert decode_tensor(alone, bytearray(raw_row))[0].equal(decoded_D)


@pytest.mark.parametrize("port", [99999, -1, 65536])
def test_a_port_that_does_not_exist_is_refused(port: int) -> None:
    address = f"127.0.0.1:{port}"
    server = GrpcServer(TokenService(), wire=WireSpec(bind=address), limits=LIMITS, max_clients=1)
    with pytest.raises(ConfigError, match=f"^wire.bind={address} has a port that does not exist"):
        server.start()
    with pytest.raises(ConfigError, match=f"trunk's address {address} has a port.*0 to 65535"):
        GrpcLink(address, wire=WireSpec())
