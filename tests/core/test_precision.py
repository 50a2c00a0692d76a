"""A client under `torch.autocast` has the numbers of the unsplit model under it."""

from contextlib import nullcontext
from dataclasses import replace
from functools import partial

import pytest
import torch

from fedsplit.model import join_model
from tests.core.generating import prompt, scene
from tests.core.worlds import batch, small_run, world

BFLOAT16, FLOAT16 = (
    partial(torch.autocast, "cpu", dtype) for dtype in (torch.bfloat16, torch.float16)
)


def with_autocast(autocast):
    run = small_run()
    return replace(run, model=replace(run.model, autocast=autocast))


def loop(model, autocast, follow=nullcontext):
    """Losses of three steps, and of an evaluation after them."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    losses = []
    with follow(optimizer):
        for number in range(3):
            with autocast():
                loss = model(**batch(number).inputs, labels=batch(number).labels).loss
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            losses.append(loss.item())
        with autocast(), torch.no_grad():
            return [*losses, model(**batch(9).inputs, labels=batch(9).labels).loss.item()]


def of_both(config, run, autocast, autocast_whole):
    """Losses and weights of a loop over a remote trunk, and of the unsplit model."""
    with world(config, run) as here:
        alice = here.add("alice")
        whole = join_model(alice.model, here.parts.trunk)
        with alice.trunk.session():
            found = loop(alice.model, autocast, alice.trunk.follow)
        after = join_model(alice.model, here.parts.trunk)
    wanted = loop(whole, autocast_whole)
    return (found, after.state_dict()), (wanted, whole.state_dict())


@pytest.mark.parametrize("autocast", [BFLOAT16, FLOAT16], ids=["bfloat16", "float16"])
@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_the_trunk_trains_and_evaluates_in_the_clients_autocast(
    tiny_gpt2, tiny_llama, family, autocast
):
    config = {"gpt2": tiny_gpt2, "llama": tiny_llama}[family]()
    (found, ours), (wanted, theirs) = of_both(config, small_run(), autocast, autocast)
    assert found == wanted
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    assert found != loop(join(config), nullcontext), "autocast rounds"


def join(config):
    with world(config) as here:
        return join_model(here.add("judge").model, here.parts.trunk)


@pytest.mark.parametrize("kv", ["server", "client"])
def test_a_trunk_generates_in_the_clients_autocast(kv):
    with scene("llama") as here:
        alice = here.client("alice", kv)
        ids_BT = prompt(6)
        with BFLOAT16(), torch.no_grad():
            outputs = [
                model.generate(
                    ids_BT,
                    max_new_tokens=4,
                    pad_token_id=0,
                    do_sample=False,
                    output_logits=True,
                    return_dict_in_generate=True,
                )
                for model in (alice.model, here.whole)
            ]
    (found, wanted) = (torch.stack(output.logits) for output in outputs)
    assert torch.equal(found, wanted)


def test_a_run_s_own_precision_stays_and_a_client_in_another_is_warned_once(tiny_llama, caplog):
    (found, _), (wanted, _) = of_both(
        tiny_llama(), with_autocast("bfloat16"), nullcontext, nullcontext
    )
    assert found != wanted
    (warning,) = caplog.messages
    assert warning == (
        "the trunk computes in bfloat16, because its run sets model.autocast, and this client in "
        "the precision of its weights; run the client's model under torch.autocast with bfloat16, "
        "or set model.autocast=off at both sides, and the trunk does as the client"
    )


@pytest.mark.parametrize("autocast", ["bfloat16", "auto"])
def test_a_loop_in_the_precision_of_its_run_equals_the_unsplit_model(tiny_llama, caplog, autocast):
    (found, _), (wanted, _) = of_both(tiny_llama(), with_autocast(autocast), BFLOAT16, BFLOAT16)
    assert found == wanted
    assert not caplog.messages


def test_a_family_whose_cut_autocast_rounds_is_warned_of_once(caplog):
    with scene("electra") as here:
        alice = here.client("alice")
        with alice.remote.session(training=False), BFLOAT16(), torch.no_grad():
            for _ in range(2):
                alice.model(prompt(6), use_cache=False)
    # transformers warns too, of another thing.
    (warning,) = (text for text in caplog.messages if text.startswith("under autocast"))
    assert "at the cut are in bfloat16, and the trunk continues with them in float32" in warning
