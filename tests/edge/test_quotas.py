"""One client that takes all it can get; another beside it gets the same tokens as if alone."""

import re
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager

import pytest
import torch

from fedsplit.cli import main
from fedsplit.cli.command import TOKEN_VARIABLE
from fedsplit.errors import BadTensor, Overloaded, ProtocolError, SessionLost
from fedsplit.link import LocalLink
from fedsplit.model import initial_parts
from fedsplit.spec import LimitsSpec
from fedsplit.transport.frames import to_frame
from fedsplit.transport.server import GrpcServer
from fedsplit.trunk.router import TrunkRouter
from fedsplit.trunk.service import TrunkService
from fedsplit.wire import messages as m
from tests.core.generating import Client, Scene, prompt, scene
from tests.core.worlds import Clock, small_run, wait_until, world
from tests.edge.echo import linked
from tests.edge.hostile_client import HostileClient, RawClient

FEW = LimitsSpec(sessions_per_client=3, sessions=5)


def mallory_at(here: Scene, name: str = "mallory") -> HostileClient:
    """A client that keeps to no rule."""
    link = LocalLink(here.service, here.service.admit(name))
    return HostileClient(link, here.whole.config, here.run, name)


class Honest:
    """A conversation of a client whose cache at the trunk must last from one turn to the next."""

    def __init__(self, here: Scene, name: str = "alice") -> None:
        self._here = here
        self._client: Client = here.client(name)
        self._cache = self._client.model.new_cache()
        self._text_1T = prompt()
        self.turn()

    def turn(self) -> None:
        """Continue: the tokens are the unsplit model's, and nothing was sent again."""
        wanted = self._here.wanted(self._text_1T)
        got = self._client.says(self._text_1T, past_key_values=self._cache)
        assert torch.equal(got, wanted)
        assert len(self._client.sent(m.OpenRequest)) == 1, "alice's cache was dropped"
        self._text_1T = torch.cat([wanted, prompt(3, seed=1)], dim=1)


@contextmanager
def busy(here: Scene) -> Iterator[None]:
    """A context in which the trunk answers nothing."""
    free = threading.Event()
    here.service.engine.run(free.wait)
    try:
        yield
    finally:
        free.set()


# --- calls in flight --------------------------------------------------------------------------


def test_many_calls_of_one_session_at_once_are_each_answered():
    with scene("llama") as here:
        alice, mallory = Honest(here), mallory_at(here)
        session = mallory.open()
        with busy(here):
            calls = [mallory.generate(session, call) for call in range(40)]
            told = threading.Thread(target=lambda: answers.extend(mallory.at_once(calls)))
            answers: list = []
            told.start()
            unanswered = here.service._sessions.of(session, "mallory").in_progress
            wait_until(lambda: unanswered)
        told.join(30.0)
        assert len(answers) == 40
        served = [each for each in answers if isinstance(each, m.GenerateReply)]
        assert served
        for refused in set(answers) - set(served):
            assert refused.code in ("OVERLOADED", "PROTOCOL"), refused
        alice.turn()


def test_a_call_that_comes_before_the_last_reply_is_refused_at_once():
    with scene("llama") as here:
        mallory = mallory_at(here)
        session = mallory.open()
        first: list = []
        with busy(here):
            sender = threading.Thread(
                target=lambda: first.append(mallory.ask(mallory.generate(session)))
            )
            sender.start()
            wait_until(lambda: here.service._sessions.of(session, "mallory").in_progress)
            early = mallory.ask(mallory.generate(session, call=1))
            assert isinstance(early, Overloaded) and early.retry_after_s > 0
            assert "1 requests of this session have no answer yet" in str(early)
        sender.join(30.0)
        assert isinstance(first[0], m.GenerateReply)
        # The refusal changed nothing, so the same call is served now.
        again = mallory.ask(mallory.generate(session, call=1))
        assert torch.equal(again.trunk_out_BTD, first[0].trunk_out_BTD)


@pytest.mark.parametrize("training", [True, False])
def test_forwards_without_an_answer_are_counted(training, tiny_llama):
    with world(tiny_llama()) as here:
        link = LocalLink(here.service, here.service.admit("mallory"))
        mallory = HostileClient(link, here.config, here.run)
        session = mallory.open(training=training, generating=False)
        answers: list = []
        with busy(here):
            calls = [mallory.forward(session, call, training=training) for call in range(12)]
            sender = threading.Thread(target=lambda: answers.extend(mallory.at_once(calls)))
            sender.start()
            # Two wait for the trunk, and the others have been refused.
            wait_until(lambda: threading.active_count() > 2)
            unanswered = here.service._sessions.of(session, "mallory").in_progress
            wait_until(lambda: len(unanswered) == 2)
        sender.join(30.0)
        assert len(answers) == 12
        served = sum(isinstance(each, m.ForwardReply) for each in answers)
        assert served >= 2
        assert {each.code for each in answers if not isinstance(each, m.Reply)} <= {
            "OVERLOADED",
            "PROTOCOL",
        }


# --- sessions ---------------------------------------------------------------------------------


def test_a_client_that_opens_sessions_without_end_loses_its_own_oldest():
    with scene("llama", limits=FEW) as here:
        alice, mallory = Honest(here), mallory_at(here)
        opened = [mallory.open() for _ in range(20)]
        assert here.service.num_sessions == 1 + FEW.sessions_per_client
        lost = mallory.ask(mallory.generate(opened[-4]))
        assert isinstance(lost, SessionLost)
        for session in opened[-3:]:
            assert isinstance(mallory.ask(mallory.generate(session)), m.GenerateReply)
        alice.turn()


def test_many_clients_with_many_sessions_end_those_of_the_one_with_most():
    with scene("llama", limits=FEW) as here:
        alice = Honest(here)
        for name in ("mallory", "malcolm", "mordred"):
            hostile = mallory_at(here, name)
            for _ in range(FEW.sessions_per_client):
                hostile.open()
        assert here.service.num_sessions == FEW.sessions
        alice.turn()


def test_a_session_that_trains_is_not_ended_for_another_one(tiny_llama):
    run = small_run(limits=LimitsSpec(sessions=1))
    with world(tiny_llama(), run) as here:
        here.add("alice").trunk.open()
        mallory = HostileClient(
            LocalLink(here.service, here.service.admit("mallory")), here.config, run
        )
        with pytest.raises(Overloaded, match=r"1 sessions are open, .* \(limits.sessions\)"):
            mallory.open()
        assert here.members["alice"].trunk.training_state().step == 0


def test_no_more_clients_train_than_the_run_has(tiny_llama):
    run = small_run(clients=2)
    with world(tiny_llama(), run) as here:
        for name in ("alice", "bob"):
            here.add(name).trunk.open()
        assert here.service.budgets()["clients"] == "2 of 2"
        link = LocalLink(here.service, here.service.admit("mallory"))
        mallory = HostileClient(link, here.config, run)
        with pytest.raises(Overloaded, match="2 other clients train here, .* clients=2; try"):
            mallory.open(training=True, generating=False)
        here.members["alice"].trunk.open()  # in place of her first session
        here.members["bob"].trunk.close()
        mallory.open(training=True, generating=False)


def test_a_silent_session_that_generates_is_ended():
    clock = Clock()
    with scene("llama", clock, ttl_s=60.0, max_queue_delay_s=0.0) as here:
        alice, mallory = Honest(here), mallory_at(here)
        silent = [mallory.open() for _ in range(5)]
        mallory.ask(mallory.generate(silent[0]))
        clock.now = 50.0
        alice.turn()
        clock.now = 61.0
        wait_until(lambda: here.service.num_sessions == 1)
        assert isinstance(mallory.ask(mallory.generate(silent[0], call=1)), SessionLost)
        alice.turn()


# --- memory -----------------------------------------------------------------------------------


def test_a_client_that_fills_the_caches_loses_its_own():
    with scene("llama") as here:
        Honest(here)
        one = here.service.engine.cache_bytes
    with scene("llama", cache_bytes=4 * one) as here:
        alice, mallory = Honest(here), mallory_at(here)
        for _ in range(8):
            session = mallory.open()
            assert isinstance(mallory.ask(mallory.generate(session)), m.GenerateReply)
            assert here.service.engine.cache_bytes <= 4 * one
        alice.turn()


def test_caches_of_one_pass_never_exceed_the_budget():
    """Many prompts that wait together would each fit alone."""
    rows = 2
    with scene("llama") as here:
        mallory = mallory_at(here)
        mallory.ask(mallory.generate(mallory.open()))
        one = here.service.engine.cache_bytes
    with scene("llama", cache_bytes=2 * one) as here:
        mallory, passes = mallory_at(here), []
        calls = [mallory.generate(mallory.open()) for _ in range(6)]
        here.trunk.register_forward_pre_hook(lambda _, args: passes.append(args[0].shape[:2]))
        with busy(here):
            answers: list = []
            sender = threading.Thread(target=lambda: answers.extend(mallory.at_once(calls)))
            sender.start()
            wait_until(lambda: here.service.engine._scheduler.has_arrivals(1))
        sender.join(30.0)
        assert all(isinstance(each, m.GenerateReply) for each in answers)
        assert max(rows_B * tokens for rows_B, tokens in passes) <= 2 * rows * 3


def test_a_reply_that_is_too_large_to_keep_is_not_sent_twice():
    with scene("llama", limits=LimitsSpec(reply_bytes=1000)) as here:
        alice, mallory = Honest(here), mallory_at(here)
        session = mallory.open()
        large = mallory.generate(session, logits_to_keep=3, smashed_BTD=torch.ones(4, 3, 32))
        assert isinstance(mallory.ask(large), m.GenerateReply)
        lost = mallory.ask(large)
        assert isinstance(lost, SessionLost) and "larger than limits.reply_bytes" in str(lost)
        alice.turn()


def test_long_prompts_of_one_client_do_not_delay_the_prompt_of_another():
    with scene("llama", chunk_tokens=8) as here:
        alice, mallory, order = mallory_at(here, "alice"), mallory_at(here), []
        prompts = [
            mallory.generate(mallory.open(), smashed_BTD=torch.ones(1, 40, 32)) for _ in range(4)
        ]
        short = alice.generate(alice.open(), smashed_BTD=torch.ones(1, 12, 32))

        def send(client: HostileClient, request: m.GenerateRequest) -> None:
            answer = client.ask(request)
            order.append(("alice" if client is alice else "mallory", answer))

        with busy(here):
            senders = [threading.Thread(target=send, args=(mallory, each)) for each in prompts]
            for sender in senders:
                sender.start()
            waiting = here.service._sessions._open.values()
            wait_until(lambda: sum(len(each.in_progress) for each in waiting) == 4)
            senders.append(threading.Thread(target=send, args=(alice, short)))
            senders[-1].start()
            wait_until(lambda: sum(len(each.in_progress) for each in waiting) == 5)
        for sender in senders:
            sender.join(30.0)
        assert [name for name, _ in order] == ["alice", *["mallory"] * 4]
        assert all(isinstance(answer, m.GenerateReply) for _, answer in order)


# --- over a real connection -------------------------------------------------------------------


def test_frames_of_one_session_at_once_over_a_real_link():
    """120 Generate calls of one session in flight: each is answered, and no slot is held."""
    with scene("llama") as here:
        limits = here.service.limits
        server = GrpcServer(here.service, wire=here.run.wire, limits=limits, max_clients=4)
        address = server.start()
        mallory = mallory_at(here)
        try:
            with (
                linked(address, token=here.service.admit("alice")) as link,
                RawClient(address, here.service.admit("mallory")) as raw,
                ThreadPoolExecutor(40) as pool,
            ):
                alice = here.client("alice", link=link)
                session, wanted = mallory.open(), here.wanted(prompt())
                frames = [to_frame(mallory.generate(session, call)) for call in range(120)]
                answers = pool.map(lambda frame: raw.unary("Generate", frame), frames)
                assert torch.equal(alice.says(prompt()), wanted)
                codes = [getattr(each, "code", "") for each in answers]
        finally:
            server.stop(grace_s=0.0)
        assert len(codes) == 120 and set(codes) <= {"", "OVERLOADED", "PROTOCOL"}


# --- values -----------------------------------------------------------------------------------

LARGEST = torch.iinfo(torch.int64).max
BOOLS_BT, BOOLS_B = torch.ones(2, 3, dtype=torch.bool), torch.tensor([True, False])

VALUES = {
    "bool positions": ({"position_ids_BT": BOOLS_BT}, "position_ids is bool"),
    "bool rows": ({"rows_B": BOOLS_B}, "rows_B is bool"),
    "float rows": ({"rows_B": torch.zeros(2)}, "rows_B is float32"),
    "positions before the table": (
        {"position_ids_BT": torch.full((2, 3), -1)},
        "are -1 to -1, but this model has those from 0 to 127",
    ),
    "positions after the table": (
        {"position_ids_BT": torch.full((2, 3), LARGEST)},
        f"are {LARGEST} to {LARGEST}, but",
    ),
}


@pytest.mark.parametrize("kind", ["generate", "evaluate", "train"])
def test_values_that_a_family_cannot_compute_with_are_refused(kind, caplog):
    """GPT-J indexes a table with positions; most families compute with them."""
    with scene("gptj") as here:
        alice, mallory = Honest(here), mallory_at(here)
        for changes, text in VALUES.values():
            if kind == "generate":
                answer = mallory.ask(mallory.generate(mallory.open(), **changes))
            elif "rows_B" in changes:
                continue
            else:
                session = mallory.open(generating=False, training=kind == "train")
                answer = mallory.ask(mallory.forward(session, training=kind == "train", **changes))
            assert isinstance(answer, BadTensor) and text in str(answer)
        alice.turn()
    assert not caplog.records


def test_a_mask_of_bools_or_of_other_numbers_is_one_of_ones_and_zeros():
    with scene("llama") as here:
        mallory = mallory_at(here)
        plain_BT = torch.tensor([[0, 1, 1], [1, 1, 1]])
        masks = (plain_BT, plain_BT.bool(), -7 * plain_BT, plain_BT.int() * 3)
        outs = [
            mallory.ask(mallory.generate(mallory.open(), attention_mask_BT=mask_BT)).trunk_out_BTD
            for mask_BT in masks
        ]
        assert all(torch.equal(out, outs[0]) for out in outs[1:])


def test_a_cache_of_fixed_size_is_refused_where_the_family_has_none():
    with scene("bloom") as here:
        alice = Honest(here)
        with pytest.raises(ProtocolError, match="has no caches of a fixed size; generate without"):
            mallory_at(here).open(cache_tokens=8)
        alice.turn()


# --- what is in use ---------------------------------------------------------------------------


def test_clients_see_how_much_of_each_budget_is_in_use_and_strangers_do_not():
    with scene("llama", limits=FEW, session_tokens=100) as here:
        Honest(here)
        mallory = mallory_at(here)
        for _ in range(FEW.sessions_per_client):
            mallory.ask(mallory.generate(session := mallory.open()))
        budgets = mallory.ask(m.ServiceInfoRequest()).budgets
        assert budgets["limits.sessions"] == f"4 of {FEW.sessions}"
        assert budgets["limits.sessions_per_client"] == f"3 of {FEW.sessions_per_client}"
        assert budgets["generation.session_tokens"] == "19 of 100"
        engine, run = here.service.engine, here.run
        assert budgets["generation.cache_bytes"] == (
            f"{engine.cache_bytes} of {run.generation.cache_bytes}"
        )
        assert budgets["wire.stash_bytes"] == f"0 of {run.wire.stash_bytes}"
        reply = mallory.ask(mallory.generate(session, call=1))
        assert budgets["limits.reply_bytes"] == f"{reply.trunk_out_BTD.nbytes} of {4 << 20}"
        kept = sum(each.reply_bytes() for each in here.service._sessions._open.values())
        assert budgets["replies"] == f"{kept} of {5 * (4 << 20)}"
        assert LocalLink(here.service).exchange(m.ServiceInfoRequest()).budgets == {}


def test_info_shows_how_much_of_each_limit_is_in_use(monkeypatch, capfd):
    with scene("llama", limits=FEW) as here:
        limits = here.service.limits
        server = GrpcServer(here.service, wire=here.run.wire, limits=limits, max_clients=4)
        address = server.start()
        monkeypatch.setenv(TOKEN_VARIABLE, here.service.admit("mallory"))
        mallory_at(here).open()
        try:
            assert main(["info", address]) == 0
        finally:
            server.stop(grace_s=0.0)
    told = dict(re.findall(r"^in use: (\S+) +(.+)$", capfd.readouterr().out, re.MULTILINE))
    assert told["limits.sessions"] == f"1 of {FEW.sessions}"
    assert told["streams"] == "0 of 4"
    assert told["limits.calls_per_client"] == f"1 of {FEW.calls_per_client}"


# --- one token for all ------------------------------------------------------------------------


def test_a_server_remembers_only_so_many_clients_and_sessions(tiny_llama):
    run, config = small_run(limits=FEW), tiny_llama()
    service = TrunkService(initial_parts(config, run.split, 1).trunk, run)
    with TrunkRouter({"one": service}, max_clients=3) as router:
        link = LocalLink(router)
        alice = HostileClient(link, config, run, "alice")
        session = alice.open()
        for number in range(10):
            mallory = HostileClient(link, config, run, f"mallory-{number}")
            link.exchange(m.CloseRequest(session=mallory.open()))
        assert router.num_clients == 3
        mallory = HostileClient(link, config, run)
        for _ in range(10):
            mallory.open()
        assert len(router._sessions) <= 1 + FEW.sessions_per_client + 1
        assert isinstance(alice.ask(alice.generate(session)), m.GenerateReply)
        assert alice.ask(m.ServiceInfoRequest()).budgets["limits.clients"] == "3 of 3"
        HostileClient(link, config, run, "malcolm").open()
        with pytest.raises(Overloaded, match=r"3 clients have sessions here, .*limits.clients"):
            HostileClient(link, config, run, "mordred").open()
