"""A trainer with a shield, over the real protocol: what the link carries, and what is counted."""

from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from fedsplit.client.ledger import Ledger, epsilon
from fedsplit.client.privacy import NoiseKey, PublicRows, Shield
from fedsplit.client.public_text import gradient_radius, public_rows, random_tokens
from fedsplit.client.trainer import ClientTrainer
from fedsplit.errors import PrivacyBudget
from fedsplit.link import LocalLink
from fedsplit.model import connect
from fedsplit.spec import PrivacySpec
from fedsplit.trunk.service import TrunkService
from fedsplit.wire import messages as m
from simulations.tiny import tiny_config
from tests.core.worlds import Member, batch, small_run, world

KEY = NoiseKey(bytes(range(32)))
CONFIG = tiny_config("gpt2", num_hidden_layers=4)
ISOLATED = replace(
    small_run(),
    train=replace(small_run().train, mode="isolated"),
    privacy=PrivacySpec(kind="noise"),
)


class CountingLink(LocalLink):
    """Keeps all requests that pass."""

    def __init__(self, service: TrunkService, token: str) -> None:
        super().__init__(service, token)
        self.requests: list[m.Request[Any]] = []

    def exchange(self, request: m.Request[m.R]) -> m.R:
        """Keep a request, and carry it."""
        self.requests.append(request)
        return super().exchange(request)

    def sent(self, message: type[m.Request[Any]], name: str) -> list[Any]:
        return [getattr(each, name) for each in self.requests if isinstance(each, message)]


@contextmanager
def shielded(place: Path, run=None, **options: Any):
    """A client with a shield, its link and its ledger."""
    run = run or small_run()
    with world(CONFIG, run) as small:
        link = CountingLink(small.service, small.service.admit("client-0"))
        member = small.add("client-0", link)
        ids_BT = random_tokens(member.model.config, 12)
        ledger = Ledger(place / "ledger.db", options.pop("budget_bits", 0.0))
        unit = gradient_radius(member.model, ids_BT, is_classifier=False)
        shield = Shield(
            member.trunk,
            public_rows(member.model, ids_BT),
            KEY,
            **{"z": 0.5, "gradient": 0.5, **options},
            grad_radius=unit,
            ledger=ledger,
        )
        connect(member.model, shield)
        member.trainer = ClientTrainer(member.model, member.trunk, run, shield=shield)
        yield member, link, ledger


def rows_in(tensors: list[torch.Tensor]) -> int:
    """The rows of the sequences that differ."""
    distinct = {each.numpy().tobytes() for sent in tensors for each in sent}
    return len(distinct) * tensors[0].shape[1]


def test_the_ledger_has_exactly_the_rows_that_the_link_carried(tmp_path: Path):
    with shielded(tmp_path) as (member, link, ledger):
        member.trainer.fit([[batch(0)], [batch(1)], [batch(0)]])
        member.trainer.evaluate([batch(2), batch(3)])
        rows, labels = ledger.spent("rows"), ledger.spent("labels")
        sent = link.sent(m.ForwardRequest, "smashed_BTD")
        gradients = link.sent(m.BackwardRequest, "grad_trunk_out_BTD")
    assert rows.num_rows == rows_in(sent) == 5 * 2 * 12
    assert labels.num_rows == rows_in(gradients) == 3 * 2 * 12
    # Two texts were there in two steps, between which the bottom has changed.
    assert rows.num_texts == 8 and labels.num_texts == 4
    assert rows.row_epsilon == epsilon(4.0 * 2**0.5)


def test_a_hundred_repeats_of_a_step_send_the_same_bytes(tmp_path: Path):
    with shielded(tmp_path) as (member, link, ledger):
        for _ in range(100):
            # As a server can provoke them: a step whose session is lost is begun again.
            with member.trunk.session():
                member.trainer._forward_backward([batch(0)], batch(0).num_tokens)
        sent = link.sent(m.ForwardRequest, "smashed_BTD")
        gradients = link.sent(m.BackwardRequest, "grad_trunk_out_BTD")
        assert len(sent) == len(gradients) == 100
        assert len({each.numpy().tobytes() for each in sent}) == 1
        assert len({each.numpy().tobytes() for each in gradients}) == 1
        assert ledger.spent("rows").num_rows == ledger.spent("labels").num_rows == 2 * 12


def test_over_the_budget_nothing_is_sent(tmp_path: Path):
    with shielded(tmp_path, budget_bits=4.0) as (member, link, _):
        with pytest.raises(PrivacyBudget, match="one more release of a text would tell up to 5"):
            member.trainer.fit([[batch(0)], [batch(0)]])
        assert len(link.sent(m.ForwardRequest, "smashed_BTD")) == 1


def test_the_noise_of_gradients_has_its_size_whatever_the_batch_is(tmp_path: Path):
    """A gradient is divided by the tokens of a step, and the noise with it."""
    sizes = {}
    for rows in (1, 2):
        with shielded(tmp_path / str(rows), gradient=0.5) as (member, link, _):
            member.trainer.fit([[batch(0, rows=rows)]])
            (grad_BTD,) = link.sent(m.BackwardRequest, "grad_trunk_out_BTD")
            sizes[rows] = float(grad_BTD.square().mean().sqrt()) * batch(0, rows=rows).num_tokens
    assert sizes[2] == pytest.approx(sizes[1], rel=0.15)


def test_an_isolated_trunk_gets_no_gradient_and_the_bottom_still_learns(tmp_path: Path):
    with shielded(tmp_path, ISOLATED, gradient="none") as (member, link, ledger):
        before = {n: p.detach().clone() for n, p in member.model.named_parameters()}
        stats = member.trainer.fit([[batch(n)] for n in range(3)])
        assert stats.steps == 3
        assert link.sent(m.BackwardRequest, "call") == link.sent(m.StepRequest, "step") == []
        changed = {n for n, p in member.model.named_parameters() if not torch.equal(p, before[n])}
        assert changed == set(before), "of bottom and top"
        assert ledger.spent("labels").num_rows == 0


def test_the_same_beginning_of_two_texts_has_the_same_noise(tmp_path: Path):
    """Otherwise, boilerplate would be released once for each text that has it."""
    first, second = batch(0, rows=1), batch(1, rows=1)
    second.inputs["input_ids"][:, :6] = first.inputs["input_ids"][:, :6]
    with shielded(tmp_path) as (member, link, _):
        member.trainer.evaluate([first, second])
        one_BTD, two_BTD = link.sent(m.ForwardRequest, "smashed_BTD")
    torch.testing.assert_close(one_BTD[:, :6], two_BTD[:, :6], rtol=0, atol=1e-4)
    assert float((one_BTD[:, 6:] - two_BTD[:, 6:]).abs().min(-1).values.max()) > 0


def test_released_rows_lie_on_a_grid():
    public = PublicRows.of(torch.randn(500, 8, generator=torch.manual_seed(0)))
    sent: list[torch.Tensor] = []

    def trunk(rows_BTD: torch.Tensor) -> torch.Tensor:
        sent.append(rows_BTD)
        return rows_BTD

    Shield(trunk, public, KEY, z=0.5, shrink=False)(torch.randn(1, 40, 8))
    step = 2.0 ** torch.floor(torch.log2(torch.tensor(0.5 * public.radius / 1024)))
    places = (sent[0] - public.mean_D) / step
    torch.testing.assert_close(places, places.round(), rtol=0, atol=2e-2)


def test_rows_of_public_text_leave_the_model_as_it_was():
    with world(CONFIG) as small:
        member: Member = small.add("client-0")
        member.model.train()
        public = public_rows(member.model, random_tokens(member.model.config, 12))
        assert member.model.training and public.radius > 0
        assert public.mean_D.shape == (CONFIG.hidden_size,)
