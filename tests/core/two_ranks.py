"""Run by test_tensor_parallel.py: trunks on two forked ranks, compared with those in one process.

Prints the lines of `simulations.families --tp 2` for some families, and then a JSON object with
what else was found, by name.
"""

import copy
import json
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from fedsplit.errors import FedsplitError
from fedsplit.model import build_trunk, split_model
from fedsplit.model.lora import add_adapters, load_adapter, save_adapter
from fedsplit.model.tensor_parallel import bytes_of_rank, sharding
from fedsplit.spec import LoraSpec, TrainSpec
from fedsplit.trunk.call import Call, Kind
from fedsplit.trunk.follower_training import FollowerTraining
from fedsplit.trunk.service import TrunkService
from fedsplit.trunk.training import Training
from fedsplit.trunk.update import TrunkUpdate
from fedsplit.wire.messages import BackwardRequest, ForwardRequest, StepRequest
from simulations import families
from simulations.families import random_model
from simulations.sharded import compared, on_ranks, run_of, trained, trunk_of, without_dropout
from simulations.tiny import tiny_config

FAMILIES = ("llama", "qwen3", "apertus", "mixtral", "llama4_text")
"""A plain one, norms that the plan names, scalars that it does not, experts, and one that fails."""

ADAMW = TrainSpec(batch_size=2, optimizer="adamw", lr=1e-3, clip_norm=0.5, warmup_steps=0)
LORA = LoraSpec(enabled=True, targets="q_proj,o_proj,up_proj,down_proj")


def check(folder: Path) -> dict[str, Any]:
    whole = random_model(without_dropout(tiny_config("qwen3", num_hidden_layers=4)))
    run = run_of(4, train=ADAMW)
    found = {
        "adamw": compared(whole, run, 2),
        "lora": compared(whole, run_of(4, train=ADAMW, lora=LORA), 2),
        "resumed": resumed(whole, run),
        "read": read(whole, run, folder),
        "refused": {
            "gpt2": refused("gpt2"),
            "gpt_oss": refused("gpt_oss"),
            "llama": refused("llama", num_key_value_heads=1),
        },
        "uneven": uneven(),
        "adapter": adapted(whole, folder),
        "followed": followed(whole, run),
    }
    return found


def resumed(whole: Any, run: Any) -> dict[str, bool]:
    """Whether a state of one rank is the same on two, and the other way round."""
    alone, _ = trained(whole, trunk_of(whole, run), run)
    cut, _ = trained(whole, trunk_of(whole, run, 2), run)
    again = {"cut from alone": reloaded(trunk_of(whole, run, 2), run, alone) == 0}
    if dist.get_rank() == 0:
        again["alone from cut"] = reloaded(trunk_of(whole, run), run, cut) == 0
    return again


def reloaded(trunk: Any, run: Any, state: Any) -> int:
    """The number of tensors that differ after a state was loaded; none at other ranks."""
    service = TrunkService(trunk, run)
    service.engine.load_state(state)
    after = service.engine.state()
    if dist.get_rank():
        return 0
    return sum(not torch.equal(after[name], tensor) for name, tensor in state.items())


def read(whole: Any, run: Any, folder: Path) -> dict[str, Any]:
    """Whether shards read from files are those of tensors in memory, and their share of bytes."""
    trunk = build_trunk(whole.config, run.split, source=str(folder / "model"), **sharding(2))
    same = trunk_of(whole, run, 2)
    pairs = zip(trunk.parameters(), same.parameters(), strict=True)
    return {
        "equal": all(torch.equal(a.to_local(), b.to_local()) for a, b in pairs if is_cut(a)),
        "share": bytes_of_rank(trunk) / bytes_of_rank(trunk_of(whole, run)),
    }


def followed(whole: Any, run: Any) -> dict[str, bool]:
    """Whether steps are the same, bit by bit, if a follower on ranks has computed the gradients."""
    alone, leader, follower = (
        kind(trunk_of(whole, run, 2), run, time.monotonic, TrunkUpdate)
        for kind in (Training, Training, FollowerTraining)
    )
    for each in (alone, leader, follower):
        each.join("alice", 0.0)
    for step in range(2):
        for each in (alone, follower):
            accumulate(each, step)
        positions, barrier_version, gradients = follower.take("alice", "s")
        leader.receive("s", positions, barrier_version, of_rank_0(gradients))
        request = StepRequest(session="s", call=step, step=step, num_tokens=4, client_sq_norm=0.0)
        for each in (alone, leader):
            each.contribute(call(Kind.STEP, request), 0.0)
            assert len(each.step_if_due()) == 1
        given = leader.shared.parameters()
        values = of_rank_0(given.values)
        follower.follow(given.version, given.barrier_version, False, values)
    return {
        "leader": same(leader.state(), alone.state()),
        "follower": same(follower.shared.versions.values(), leader.shared.versions.values()),
    }


def call(kind: Kind, request: Any) -> Call:
    return Call(kind=kind, client="alice", session="s", request=request)


def accumulate(training: Training, step: int) -> None:
    """A forward and a backward of a client."""
    hidden_BTD = torch.randn(2, 5, 32, generator=torch.Generator().manual_seed(step))
    asked = ForwardRequest(session="s", call=step, training=True, smashed_BTD=hidden_BTD)
    forward = call(Kind.FORWARD, asked)
    training.prepare_forward(forward)
    training.forward([forward])
    grads = BackwardRequest(session="s", call=step, want_grad=True, grad_trunk_out_BTD=hidden_BTD)
    backward = call(Kind.BACKWARD, grads)
    training.prepare_backward(backward)
    training.backward([backward])


def of_rank_0(tensors: Any) -> Any:
    """The tensors that rank 0 has, as if they had crossed a network."""
    held = [tensors]
    dist.broadcast_object_list(held)
    return held[0]


def same(here: Any, there: Any) -> bool:
    """Whether tensors are equal at all ranks."""
    equal = here.keys() == there.keys() and all(torch.equal(here[k], there[k]) for k in here)
    count = torch.tensor(int(equal))
    dist.all_reduce(count)
    return int(count) == dist.get_world_size()


def is_cut(parameter: Any) -> bool:
    return hasattr(parameter, "to_local")


def refused(family: str, **sizes: int) -> str:
    whole = random_model(without_dropout(tiny_config(family, num_hidden_layers=4, **sizes)))
    try:
        trunk_of(whole, run_of(4), 2)
    except FedsplitError as exc:
        return str(exc)
    return ""


def uneven() -> str:
    config = without_dropout(tiny_config("llama", num_hidden_layers=4, intermediate_size=33))
    whole, lora = random_model(config), replace(LORA, dropout=0.5)
    try:
        TrunkService(trunk_of(whole, run_of(4, lora=lora), 2), run_of(4, lora=lora))
    except FedsplitError as exc:
        return str(exc)
    return ""


def adapted(whole: Any, folder: Path) -> float:
    """The largest difference between an adapter that was loaded on ranks, and in one process."""
    ids_BTD = torch.randn(2, 5, 32, generator=torch.Generator().manual_seed(0))
    outs = []
    for ranks in (1, 2):
        trunk = trunk_of(whole, run_of(4), ranks)
        load_adapter(trunk, str(folder / "adapter"))
        outs.append(trunk.run(ids_BTD).detach())
    plain = trunk_of(whole, run_of(4)).run(ids_BTD).detach()
    assert not torch.allclose(outs[0], plain)
    return float((outs[0] - outs[1]).abs().max())


def main() -> None:
    families.main([*FAMILIES, "--tp", "2"])
    folder = Path(sys.argv[1])
    whole = random_model(without_dropout(tiny_config("qwen3", num_hidden_layers=4)))
    whole.save_pretrained(folder / "model")
    write_adapter(whole, folder / "adapter")
    print(json.dumps(on_ranks(lambda: check(folder), 2, seconds=240)))


def write_adapter(whole: Any, folder: Path) -> None:
    parts = split_model(copy.deepcopy(whole), "1/2/1")
    for part in (parts.client, parts.trunk):
        add_adapters(part, LORA)
        with torch.no_grad():
            for parameter in part.parameters():
                if parameter.requires_grad:
                    parameter.normal_(std=0.1)
    folder.mkdir()
    save_adapter(parts.client, parts.trunk, folder)


if __name__ == "__main__":
    main()
