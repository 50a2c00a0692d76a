"""Both ends of the wire over real gRPC: what arrives, what is refused, and what breaks."""

import logging
import os
import select
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Any

import grpc
import pytest
import torch
from grpc_health.v1 import health_pb2, health_pb2_grpc

from fedsplit import errors
from fedsplit.errors import FedsplitError
from fedsplit.spec import WireSpec
from fedsplit.transport.client import GrpcLink
from fedsplit.transport.frames import SERVICE, to_frame, to_frames
from fedsplit.transport.server import GrpcServer
from fedsplit.transport.streams import SESSIONS, Streams
from fedsplit.wire import messages as m
from simulations.bench.certificate import self_signed
from tests.edge.echo import LIMITS, EchoService, forward, linked, serving

ERRORS = [
    cls
    for cls in vars(errors).values()
    if isinstance(cls, type) and issubclass(cls, FedsplitError) and cls is not FedsplitError
]
INFO = m.ServiceInfoRequest()


@pytest.fixture
def service() -> EchoService:
    return EchoService()


@pytest.fixture
def address(service: EchoService) -> Iterator[str]:
    with serving(service) as where:
        yield where


@pytest.fixture
def link(address: str) -> Iterator[GrpcLink]:
    with linked(address) as opened:
        yield opened


# --- what works ------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["tcp", "unix", "tls"])
def test_every_request_is_answered(kind: str, service: EchoService, tmp_path: Path) -> None:
    wire = {
        "tcp": WireSpec(),
        "unix": WireSpec(bind=f"unix:{tmp_path}/trunk.sock"),
        "tls": self_signed(tmp_path, "trunk"),
    }[kind]
    with serving(service, wire) as where, linked(where, wire=wire) as link:
        opened = link.exchange(
            m.OpenRequest(
                protocol=1,
                client="s1",
                model="m",
                config="f",
                hidden_size=128,
                round=2,
                training=True,
            )
        )
        assert opened == m.OpenReply(
            session="s1", server_instance_id="i1", version=3, limits=LIMITS, autocast="float16"
        )
        sent = forward(tokens=5, call=7)
        reply = link.exchange(sent)
        assert reply.trunk_out_BTD.equal(sent.smashed_BTD)
        assert reply.version == 7
        back = link.exchange(
            m.BackwardRequest(
                session="s1", call=7, want_grad=False, grad_trunk_out_BTD=sent.smashed_BTD
            )
        )
        assert (back.grad_smashed_BTD, back.trunk_sq_norm) == (None, 0.5)
        step = m.StepRequest(
            session="s1", call=7, step=4, num_tokens=9, client_sq_norm=0.25, loss_scale=512.0
        )
        assert link.exchange(step) == m.StepReply(version=5)
        assert service.handled[-1] == step
        state = link.exchange(m.TrainingStateRequest(session="s1"))
        assert state == m.TrainingStateReply(round=1, step=2, lr=0.5, version=3)
        assert link.exchange(INFO).family == "echo"
        grads = link.exchange(m.GradientsRequest(session="s1", tensors=True))
        assert (grads.norms, grads.names) == ({"block.0": 2.0}, ("bias", "weight"))
        assert [tuple(g.shape) for g in grads.gradients] == [(3,), (700, 700)]
        assert link.exchange(m.CloseRequest(session="s1")) == m.CloseReply()


@pytest.mark.parametrize("tokens", [1, 2047, 2048, 2049, 8192], ids=lambda n: f"{n * 512} bytes")
def test_tensors_of_every_size_arrive_with_their_mask(
    tokens: int, link: GrpcLink, service: EchoService
) -> None:
    rows = -(-tokens // 1024)
    smashed_BTD = torch.randn(rows, tokens // rows, 128)
    mask_BT = torch.rand(smashed_BTD.shape[:2]) > 0.5
    fields: dict[str, Any] = dict(session="s1", call=0, training=False)
    request = m.ForwardRequest(smashed_BTD=smashed_BTD, attention_mask_BT=mask_BT, **fields)
    assert link.exchange(request).trunk_out_BTD.equal(smashed_BTD)
    seen: Any = service.handled[-1]
    assert seen.attention_mask_BT.equal(mask_BT)
    assert seen.position_ids_BT is None


def test_bytes_are_counted_with_their_headers(link: GrpcLink) -> None:
    request = forward(tokens=1024)
    reply = link.exchange(request)
    up = sum(map(len, to_frames(request)))
    down = sum(map(len, to_frames(reply)))
    assert (link.bytes_up, link.bytes_down) == (up, down)
    info = link.exchange(INFO)
    assert (link.bytes_up, link.bytes_down) == (
        up + len(to_frame(INFO)),
        down + len(to_frame(info)),
    )


def test_a_link_may_be_used_by_several_threads(link: GrpcLink) -> None:
    def ask(call: int) -> tuple[int, bool]:
        request = forward(tokens=1 + call, call=call)
        reply = link.exchange(request)
        assert link.exchange(INFO).version == 3
        return reply.version, reply.trunk_out_BTD.equal(request.smashed_BTD)

    with ThreadPoolExecutor(4) as pool:
        assert list(pool.map(ask, range(24))) == [(call, True) for call in range(24)]


def test_requests_are_sent_before_the_replies_are_there(
    link: GrpcLink, service: EchoService
) -> None:
    service.gate.clear()
    stream = link.stream()
    answers = [stream.begin(forward(tokens=1 + call, call=call)) for call in range(3)]
    assert service.working.wait(10)
    assert len(service.handled) == 1, "one after another"
    with ThreadPoolExecutor(3) as pool:
        replies = [pool.submit(answer) for answer in reversed(answers)]
        service.gate.set()
        found = [reply.result(10) for reply in reversed(replies)]
    assert [reply.version for reply in found] == [0, 1, 2]
    assert [reply.trunk_out_BTD.shape[1] for reply in found] == [1, 2, 3]


# --- what is refused -------------------------------------------------------------------------


@pytest.mark.parametrize("request_", [forward(), INFO], ids=["stream", "unary"])
@pytest.mark.parametrize("cls", ERRORS, ids=lambda cls: cls.code)
def test_every_error_arrives_as_itself(
    cls: type[FedsplitError], request_: m.Request[Any], link: GrpcLink, service: EchoService
) -> None:
    service.refusal = cls("what was wrong, what to do", retry_after_s=1.5)
    with pytest.raises(FedsplitError, match="^what was wrong, what to do$") as caught:
        link.exchange(request_)
    assert type(caught.value) is cls
    assert caught.value.retry_after_s == 1.5
    service.refusal = None
    link.exchange(request_)
    assert service.gone(0) == []


def test_a_refused_unary_call_tells_its_code_in_the_trailing_metadata(address: str) -> None:
    with grpc.insecure_channel(address) as channel:
        info = channel.unary_unary(f"/{SERVICE}/GetServiceInfo", bytes, bytes)
        with pytest.raises(grpc.RpcError) as caught:
            info(to_frame(INFO))
    told = dict(caught.value.trailing_metadata())
    assert caught.value.code() is grpc.StatusCode.UNAUTHENTICATED
    assert told == {
        "fedsplit-code": "UNAUTHENTICATED",
        "fedsplit-retryable": "false",
        "fedsplit-retry-after-ms": "0",
        "fedsplit-detail": "the token is wrong",
    }


@pytest.mark.parametrize("request_", [forward(), INFO], ids=["stream", "unary"])
def test_a_wrong_token_is_refused(request_: m.Request[Any], address: str) -> None:
    with linked(address, token="another") as link:
        with pytest.raises(errors.Unauthenticated, match="the token is wrong"):
            link.exchange(request_)


@pytest.mark.parametrize("request_", [forward(), INFO], ids=["stream", "unary"])
def test_a_fault_of_ours_is_logged_there_and_tells_nothing_here(
    request_: m.Request[Any],
    link: GrpcLink,
    service: EchoService,
    caplog: pytest.LogCaptureFixture,
) -> None:
    service.refusal = RuntimeError("a secret")
    with caplog.at_level(logging.ERROR), pytest.raises(errors.Internal) as caught:
        link.exchange(request_)
    assert str(caught.value) == "the trunk server failed; its log has the details"
    assert "RuntimeError: a secret" in caplog.text


def test_one_client_too_many_is_told_so(service: EchoService) -> None:
    with serving(service, max_clients=1) as where:
        with linked(where) as first, linked(where) as second:
            first.exchange(forward())
            with pytest.raises(errors.Overloaded, match="the server has 1 streams") as caught:
                second.exchange(forward())
            assert caught.value.retry_after_s == 1.0
            first.close()
            service.gone(1)
            assert second.exchange(forward()).version == 0


def test_a_reply_that_does_not_fit_the_request_is_refused(address: str) -> None:
    class Hostile(EchoService):
        def ForwardRequest(self, request: m.ForwardRequest) -> m.ForwardReply:
            tokens = 1 if request.call == 0 else 1000
            return m.ForwardReply(trunk_out_BTD=torch.zeros(1, tokens, 128), version=0)

        def StepRequest(self, request: m.StepRequest) -> Any:
            return m.CloseReply()

    with serving(Hostile()) as where, linked(where) as link:
        with pytest.raises(errors.BadTensor, match="answered trunk_out"):
            link.exchange(forward(tokens=4, call=0))
        with pytest.raises(errors.TooLarge, match="ForwardReply carries 512000 bytes"):
            link.exchange(forward(tokens=4, call=1))
        with pytest.raises(errors.ProtocolError, match="answered a StepRequest with a CloseReply"):
            link.exchange(
                m.StepRequest(session="s1", call=0, step=0, num_tokens=1, client_sq_norm=0.0)
            )


# --- what breaks -----------------------------------------------------------------------------


@pytest.mark.parametrize("request_", [forward(), INFO], ids=["stream", "unary"])
@pytest.mark.parametrize("where", ["127.0.0.1:9", "unix:/nowhere/trunk.sock"])
def test_no_trunk_at_the_address_is_one_clear_line(where: str, request_: m.Request[Any]) -> None:
    with linked(where) as link:
        with pytest.raises(errors.ConnectionLost, match=f"^no trunk answers at {where}: .*check"):
            link.exchange(request_)


@pytest.mark.parametrize("request_", [forward(), INFO], ids=["stream", "unary"])
def test_a_late_reply_is_a_deadline_and_the_link_goes_on(
    request_: m.Request[Any], address: str, service: EchoService
) -> None:
    service.gate.clear()
    with linked(address, deadline_s=0.3) as link:
        for _ in range(2):
            with pytest.raises(errors.DeadlineExceeded, match=r"within wire.call_deadline_s=0\.3"):
                link.exchange(request_)
        service.gate.set()
        link.exchange(request_)


def test_who_waits_behind_others_is_not_late(address: str, service: EchoService) -> None:
    def open_now_and_then() -> None:
        for call in range(7):
            while len(service.handled) <= call:
                time.sleep(0.01)
            time.sleep(0.1)
            service.gate.set()
            service.gate.clear()

    service.gate.clear()
    with linked(address, deadline_s=0.5) as link, ThreadPoolExecutor(2) as pool:
        pool.submit(open_now_and_then)
        stream = link.stream()
        answers = [stream.begin(forward(call=call)) for call in range(6)]
        assert [pool.submit(answer).result(10).version for answer in answers] == [*range(6)]
        answer = stream.begin(forward(call=6))
        assert answer().version == 6


def test_a_late_reply_takes_those_behind_it_along(address: str, service: EchoService) -> None:
    service.gate.clear()
    with linked(address, deadline_s=0.3) as link:
        stream = link.stream()
        answers = [stream.begin(forward(call=call)) for call in range(3)]
        for answer in answers:
            with pytest.raises(errors.DeadlineExceeded):
                answer()
        service.gate.set()
        assert link.exchange(forward(call=3)).version == 3


def test_a_reply_that_cannot_be_read_is_not_mistaken_for_the_next(address: str) -> None:
    class Long(EchoService):
        def ForwardRequest(self, request: m.ForwardRequest) -> m.ForwardReply:
            tokens = 9000 if request.call == 0 else 4
            return m.ForwardReply(trunk_out_BTD=torch.zeros(1, tokens, 128), version=request.call)

    with serving(Long()) as where, linked(where) as link:
        stream = link.stream()
        answers = [stream.begin(forward(tokens=4, call=call)) for call in range(2)]
        with pytest.raises(errors.TooLarge):
            answers[0]()
        with pytest.raises(errors.ConnectionLost):
            answers[1]()
        with pytest.raises(errors.ConnectionLost):
            stream.begin(forward(tokens=4, call=1))()
        assert link.exchange(forward(tokens=4, call=2)).version == 2


def test_a_link_may_idle_for_longer_than_its_deadline() -> None:
    for _ in range(100):
        service = EchoService()
        with serving(service) as address, linked(address, deadline_s=0.05) as link:
            try:
                link.exchange(forward())
                time.sleep(0.1)
                link.exchange(forward())
            except errors.DeadlineExceeded:  # on a busy machine an exchange itself may be late
                continue
            assert service.gone(0) == [], "the stream of the first is that of the second"
        assert service.gone(1) == ["s1"]
        return
    pytest.fail("no link could be used after it had idled")


def test_a_server_killed_in_a_call_is_a_lost_connection() -> None:
    command = [sys.executable, "-m", "tests.edge.echo"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout
        where = process.stdout.readline().strip()
        with linked(where) as link, ThreadPoolExecutor(1) as pool:
            waiting = pool.submit(link.exchange, forward())
            assert process.stdout.readline() == "working\n"
            process.kill()
            with pytest.raises(errors.ConnectionLost, match=f"no trunk answers at {where}"):
                waiting.result(10)
            with pytest.raises(errors.ConnectionLost, match=f"no trunk answers at {where}"):
                link.exchange(forward())


def test_a_trunk_whose_process_is_gone_is_given_up(service: EchoService) -> None:
    with ExitStack() as server:
        address = server.enter_context(serving(service))
        with linked(address, patience_s=0.2) as link:
            link.exchange(forward())
            server.close()
            codes: list[str] = []
            while "TRUNK_GONE" not in codes:
                with pytest.raises(FedsplitError) as failure:
                    link.exchange(forward())
                codes.append(failure.value.code)
                time.sleep(0.01)
    assert codes[0] == "CONN_LOST" and not failure.value.retryable


def test_closing_a_link_ends_its_call_and_its_threads(address: str, service: EchoService) -> None:
    before = set(threading.enumerate())
    service.gate.clear()
    with linked(address) as link, ThreadPoolExecutor(1) as pool:
        waiting = pool.submit(link.exchange, forward())
        assert service.working.wait(10)
        link.close()
        with pytest.raises(errors.ConnectionLost):
            waiting.result(10)
        with pytest.raises(errors.ProtocolError, match="is closed; make a new one"):
            link.exchange(forward())
        link.close()
    service.gate.set()
    for thread in set(threading.enumerate()) - before:
        if not thread.name.startswith("fedsplit-call"):
            thread.join(10)
            assert not thread.is_alive(), thread


@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
def test_a_forked_child_is_told_to_make_its_own_link(link: GrpcLink) -> None:
    link.exchange(forward())
    read, write = os.pipe()
    child = os.fork()
    if not child:
        try:
            link.exchange(forward())
        except errors.ProtocolError as exc:
            os.write(write, str(exc).encode())
        link.close()
        os._exit(0)
    try:
        assert select.select([read], [], [], 20)[0], "the child hangs"
        assert b"was made before a fork; make a new one" in os.read(read, 1000)
    finally:
        os.kill(child, 9)
        os.waitpid(child, 0)
        os.close(read)
        os.close(write)
    link.exchange(forward())


# --- TLS -------------------------------------------------------------------------------------


def test_a_server_of_another_authority_is_not_trusted(service: EchoService, tmp_path: Path) -> None:
    wire, other = self_signed(tmp_path, "trunk"), self_signed(tmp_path, "other")
    with serving(service, wire) as where:
        with linked(where, wire=other) as link:
            with pytest.raises(errors.TlsFailed, match=f"no encrypted connection to {where}.*ca"):
                link.exchange(INFO)
        with linked(where, wire=other, ca=Path(wire.tls_ca).read_bytes()) as link:
            assert link.exchange(INFO).family == "echo"


def test_a_client_and_a_server_that_disagree_on_tls(service: EchoService, tmp_path: Path) -> None:
    wire = self_signed(tmp_path, "trunk")
    with serving(service, wire) as where, linked(where) as link:
        with pytest.raises(errors.ConnectionLost, match="both sides agree on TLS"):
            link.exchange(INFO)
    with serving(service) as where, linked(where, wire=wire) as link:
        with pytest.raises(errors.TlsFailed, match="check that the trunk server has TLS on"):
            link.exchange(INFO)


@pytest.mark.parametrize("name", ["tls_cert", "tls_key"])
def test_a_missing_tls_file_is_named(name: str, service: EchoService, tmp_path: Path) -> None:
    files = self_signed(tmp_path, "trunk")
    Path(getattr(files, name)).unlink()
    server = GrpcServer(service, wire=files, limits=LIMITS, max_clients=1)
    with pytest.raises(errors.ConfigError, match=f"wire.{name}=.* cannot be read: No such file"):
        server.start()
    with pytest.raises(errors.ConfigError, match="wire.tls_ca=/no/file cannot be read"):
        GrpcLink("127.0.0.1:9", wire=WireSpec(tls_ca="/no/file"))


@pytest.mark.parametrize("found", ["no certificate", "the certificate of another key"])
def test_tls_files_that_do_not_belong_together_are_named(
    found: str, service: EchoService, tmp_path: Path
) -> None:
    files, other = self_signed(tmp_path, "trunk"), self_signed(tmp_path, "other")
    text = found if found == "no certificate" else Path(other.tls_cert).read_text()
    Path(files.tls_cert).write_text(text)
    server = GrpcServer(service, wire=files, limits=LIMITS, max_clients=1)
    named = f"wire.tls_cert={files.tls_cert} and wire.tls_key={files.tls_key} are not a certificate"
    with pytest.raises(errors.ConfigError, match=named):
        server.start()


def test_an_authority_that_is_no_certificate_is_refused_at_once(tmp_path: Path) -> None:
    files = self_signed(tmp_path, "trunk")
    with pytest.raises(errors.ConfigError, match="has no certificate that can be read.*authority"):
        GrpcLink("127.0.0.1:9", wire=WireSpec(tls_ca=files.tls_key))


# --- sessions and streams, health, shutdown ---------------------------------------------------


def test_the_service_hears_of_sessions_whose_stream_ended(
    address: str, service: EchoService
) -> None:
    with linked(address) as first, linked(address) as second:
        for session in ("s1", "closed", "moved"):
            first.exchange(forward(session=session))
        second.exchange(m.CloseRequest(session="closed"))
        second.exchange(forward(session="moved"))
        first.close()
        assert service.gone(1) == ["s1"]
    assert service.gone(2) == ["moved", "s1"]


def test_a_stranger_cannot_claim_a_session(address: str, service: EchoService) -> None:
    with linked(address) as owner:
        owner.exchange(forward(session="mine"))
        with linked(address, token="another") as thief:
            with pytest.raises(errors.Unauthenticated):
                thief.exchange(forward(session="mine"))
        with linked(address) as another:
            another.exchange(forward(session="s2"))
        assert service.gone(1) == ["s2"]


def test_streams_know_a_late_answer_from_a_moved_session() -> None:
    lost: list[str] = []
    streams = Streams(lost.append)
    old, new = object(), object()
    streams.enter(old)
    streams.enter(new)
    streams.leave(old)
    streams.carry("late", old)
    assert lost == ["late"]
    streams.carry("moved", new)
    streams.carry("moved", old)
    streams.leave(old)
    assert lost == ["late"]
    streams.leave(new)
    assert lost == ["late", "moved"]


def test_a_stream_remembers_only_so_many_sessions() -> None:
    lost: list[str] = []
    streams, stream = Streams(lost.append), object()
    streams.enter(stream)
    for number in range(3 * SESSIONS):
        streams.carry(f"session {number}", stream)
        streams.carry("used all the time", stream)
    assert lost == [f"session {number}" for number in range(2 * SESSIONS + 1)]
    streams.leave(stream)
    assert len(lost) == len(set(lost)) == 3 * SESSIONS + 1


def health_of(address: str, name: str) -> int:
    with grpc.insecure_channel(address) as channel:
        check = health_pb2_grpc.HealthStub(channel).Check
        return int(check(health_pb2.HealthCheckRequest(service=name)).status)


def test_health_is_told_the_standard_way(address: str) -> None:
    for name in ("", SERVICE):
        assert health_of(address, name) == health_pb2.HealthCheckResponse.SERVING


def test_a_stopping_server_finishes_what_it_has_and_takes_nothing_new(
    service: EchoService,
) -> None:
    server = GrpcServer(service, wire=WireSpec(), limits=LIMITS, max_clients=4)
    where = server.start()
    with linked(where) as busy, linked(where) as late, ThreadPoolExecutor(2) as pool:
        late.exchange(forward())
        service.working.clear()
        service.gate.clear()
        working = pool.submit(busy.exchange, forward(call=5))
        assert service.working.wait(10)
        stopping = pool.submit(server.stop, 20.0)
        with pytest.raises(errors.Draining, match="shutting down"):
            while True:  # as a stranger, until the stop has come this far
                with suppress(errors.Unauthenticated), linked(where, token="another") as link:
                    link.exchange(INFO)
        assert health_of(where, "") == health_pb2.HealthCheckResponse.NOT_SERVING
        with pytest.raises(errors.Draining, match="shutting down"):
            late.exchange(forward())
        service.gate.set()
        assert working.result(10).version == 5
        stopping.result(10)
        with pytest.raises(errors.ConnectionLost):
            late.exchange(INFO)


def test_an_address_in_use_is_refused(address: str, service: EchoService) -> None:
    server = GrpcServer(service, wire=WireSpec(bind=address), limits=LIMITS, max_clients=1)
    with pytest.raises(errors.ConfigError, match=f"wire.bind={address} cannot be listened on"):
        server.start()
    server.stop()
    server.stop()
