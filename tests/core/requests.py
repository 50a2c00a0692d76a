"""Requests of a client of a `World`, made and sent one by one where a test needs each."""

import torch

from fedsplit.wire import messages as m
from tests.core.worlds import batch


def forward_of(member, call=0, session=None, **changes):
    """Return a training forward of the client's embeddings for a batch, as it would cross."""
    smashed_BTD = member.model.get_input_embeddings()(batch().inputs["input_ids"]).detach()
    fields = dict(
        session=session or member.trunk._named_session(),
        call=call,
        training=True,
        smashed_BTD=smashed_BTD,
    )
    return m.ForwardRequest(**(fields | changes))


def backward_of(request, scale=1.0):
    """Return the backward of a forward, with a gradient of `scale` everywhere."""
    return m.BackwardRequest(
        session=request.session,
        call=request.call,
        want_grad=True,
        grad_trunk_out_BTD=scale * torch.ones_like(request.smashed_BTD),
    )


def step_of(request, **changes):
    """Return the step that follows the backward of a forward."""
    fields = dict(step=0, num_tokens=22, client_sq_norm=0.0)
    return m.StepRequest(session=request.session, call=request.call, **(fields | changes))


def ask(here, name, request):
    """Return the service's reply to a request of a client."""
    return here.service.handle(request, here.service.admit(name))


def prepare(here, name, call=0, seed=0):
    """Do a forward and a backward of a client; return its request, and its trunk gradient."""
    member = here.members.get(name) or here.add(name)
    if not member.trunk._session:
        member.trunk.open()
    hidden = torch.randn(2, 12, 16, generator=torch.Generator().manual_seed(seed))
    request = forward_of(member, call, smashed_BTD=hidden)
    ask(here, name, request)
    ask(here, name, backward_of(request))
    told = member.trunk.gradients(tensors=True)
    return request, dict(zip(told.names, told.gradients, strict=True))


def contribute(here, name, request, **changes):
    """Step, and wait until the engine has done what follows from it."""
    ask(here, name, step_of(request, **changes))
    here.service.close()


def step(member, seed):
    """Take a training step of a client on a batch of its own."""
    return member.trainer.step([batch(seed)])
