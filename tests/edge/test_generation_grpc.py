"""Generation over real gRPC: whatever breaks on the way, the tokens are the same."""

import time
from contextlib import closing, contextmanager

import pytest
import torch

from fedsplit.errors import ConnectionLost, TooLarge
from fedsplit.spec import WireSpec
from fedsplit.transport.client import GrpcLink
from fedsplit.wire import messages as m
from simulations.proxy import proxied
from tests.core.generating import Scene, prompt, scene
from tests.edge.disturbed import FAULTS, DisturbedLink
from tests.edge.forked import Program
from tests.edge.trunkserver import TOKEN, served, wire_spec

MODES = {
    "greedy": {},
    "beams": {"num_beams": 2},
    "lookup": {"prompt_lookup_num_tokens": 3},
    "static": {"cache_implementation": "static"},
}


@contextmanager
def client_at(here: Scene, address: str, kv: str = "server", wire: WireSpec | None = None):
    """A client with a link to the address."""
    with closing(GrpcLink(address, token=TOKEN, wire=wire or wire_spec())) as link:
        yield here.client("alice", kv=kv, link=link)


def text() -> torch.Tensor:
    """Twelve tokens, six of them twice."""
    return prompt(6).repeat(1, 2)


@pytest.mark.parametrize("kv", ["server", "client"])
def test_every_mode_over_grpc(kv):
    with served("gemma2") as (here, address), client_at(here, address, kv) as alice:
        for asked in MODES.values():
            if asked != MODES["static"] or kv == "server":
                assert torch.equal(alice.says(text(), **asked), here.wanted(text(), **asked))
        padded = prompt(12, rows=3, pad=4)
        assert torch.equal(alice.says(padded), here.wanted(padded))


def test_errors_arrive_with_their_numbers():
    with served("llama", session_tokens=30) as (here, address), client_at(here, address) as alice:
        with pytest.raises(TooLarge, match=r"3 sequences of 0 \+ 12 tokens are 36; .* at most 30"):
            alice.says(prompt(12, rows=3))
        with pytest.raises(TooLarge, match=r"a cache of 37 tokens was asked for; .* at most 30"):
            alice.says(prompt(30), cache_implementation="static")
        assert torch.equal(alice.says(text()), here.wanted(text()))


@pytest.mark.parametrize("mode", ["greedy", "beams"])
def test_connections_that_are_reset_change_no_token(mode):
    asked = {**MODES[mode], "max_new_tokens": 20, "min_new_tokens": 20}
    with served("llama") as (here, address), proxied(address, reset_every=13) as proxy:
        with client_at(here, proxy.address) as alice:
            assert torch.equal(alice.says(text(), **asked), here.wanted(text(), **asked))
        assert proxy.resets > 0


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_at_every_message_changes_no_token(fault):
    with served("llama") as (here, address):
        with closing(DisturbedLink(fault, address, token=TOKEN, wire=wire_spec())) as link:
            alice = here.client("alice", link=link)
            for asked in (MODES["greedy"], MODES["beams"]):
                assert torch.equal(alice.says(text(), **asked), here.wanted(text(), **asked))
            alice.remote.end_generations()
            assert link.phases >= {"OpenRequest", "GenerateRequest"}


def test_a_network_that_stands_still_changes_no_token():
    """The stream is held while a token is on its way, until its call is late and is repeated."""
    many = {"max_new_tokens": 12, "min_new_tokens": 12}
    wire = WireSpec(budget_s=60.0, call_deadline_s=0.5)
    with served("llama") as (here, address), proxied(address) as proxy:
        with client_at(here, proxy.address, wire=wire) as alice:
            held = []

            def hold(request):
                if held:
                    proxy.heal()
                elif getattr(request, "past", 0) == 16:
                    proxy.hold()
                    held.append(request)

            alice.wire.before = hold
            assert torch.equal(alice.says(text(), **many), here.wanted(text(), **many))
            assert len(held) == 1


def test_a_client_that_cannot_reach_its_trunk_gives_up_inside_its_budget():
    with scene("llama", budget_s=0.5) as here:
        with client_at(here, "127.0.0.1:9") as alice, pytest.raises(ConnectionLost):
            alice.says(text())


def test_nothing_is_kept_for_a_client_that_went_away():
    with served("llama", deadline_s=0.2) as (here, address):
        with client_at(here, address) as alice:
            cache = alice.model.new_cache()
            alice.says(text(), past_key_values=cache)
            assert here.service.num_sessions == 1
        until = time.monotonic() + 10.0
        while here.service.num_sessions and time.monotonic() < until:
            time.sleep(0.01)
        assert (here.service.num_sessions, here.service.engine.cache_bytes) == (0, 0)


# --- a server of its own ----------------------------------------------------------------------


class Server:
    """A trunk in a process of its own, always at the same port."""

    def __init__(self, model_type: str) -> None:
        self._model_type = model_type
        self._begin("127.0.0.1:0")
        self.address = self._program.stdout.readline().strip()

    def restart(self) -> None:
        """Kill it in a way that nobody can catch, and begin another one; does not wait for it."""
        self.end()
        self._begin(self.address)

    def end(self) -> None:
        """Kill the one that runs."""
        self._program.kill()
        self._program.end()

    def _begin(self, address: str) -> None:
        self._program = Program("tests.edge.trunkserver", self._model_type, address)


def test_a_server_that_is_killed_and_started_again_changes_no_token():
    """Before the second token is sent, and when the reply of the tenth is on its way."""
    many = {"max_new_tokens": 14, "min_new_tokens": 14, "num_beams": 2}
    server, asked = Server("llama"), []

    def before(request):
        asked.extend([request] if isinstance(request, m.GenerateRequest) else [])
        if len(asked) == 2:
            server.restart()

    def after(request):
        if isinstance(request, m.GenerateRequest) and request.past == 12 + 9:
            alice.wire.after = lambda request: None
            server.restart()
            raise ConnectionLost("the reply went down with the server")

    try:
        with scene("llama", budget_s=60.0) as here, client_at(here, server.address) as alice:
            alice.wire.before, alice.wire.after = before, after
            assert torch.equal(alice.says(text(), **many), here.wanted(text(), **many))
            replays = [each for each in alice.sent(m.GenerateRequest) if each.past == 0]
            assert len({each.session for each in replays}) == 3
    finally:
        server.end()
