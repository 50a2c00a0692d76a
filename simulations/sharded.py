"""Trains and decodes with a trunk that is cut over ranks, and compares it with the trunk in one.

`python -m simulations.families --tp N` does so for every family. Ranks are processes of this
machine that are forked, so that each has the libraries without importing them.
"""

import copy
import multiprocessing
import os
import socket
from collections.abc import Callable
from contextlib import suppress
from multiprocessing.connection import Connection
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from transformers import PretrainedConfig, PreTrainedModel

from fedsplit.client.remote import RemoteTrunk
from fedsplit.client.trainer import ClientTrainer
from fedsplit.data import Batch
from fedsplit.errors import UnsupportedModel
from fedsplit.link import LocalLink
from fedsplit.model import TrunkPart, build_client, build_trunk, connect
from fedsplit.model.dryrun import FAMILY_ERRORS
from fedsplit.model.lora import add_adapters
from fedsplit.model.plan import plan_for
from fedsplit.model.tensor_parallel import bytes_of_rank, sharding
from fedsplit.spec import DataSpec, LoraSpec, RunSpec, SplitSpec, TrainSpec
from fedsplit.trunk.service import TrunkService

SECONDS = 60.0
STEPS = 3
TOKENS = 16
TOLERANCE = 1e-5
_TRAIN = TrainSpec(
    batch_size=2, optimizer="sgd", lr=0.1, schedule="constant", warmup_steps=0, clip_norm=1.0
)


def run_of(blocks: int, *, train: TrainSpec = _TRAIN, lora: LoraSpec | None = None) -> RunSpec:
    """Return a run of one client that trains a trunk of all blocks but one at either side."""
    return RunSpec(
        clients=1,
        split=SplitSpec.parse(f"1/{blocks - 2}/1"),
        train=train,
        data=DataSpec(sequence_length=12),
        lora=lora or LoraSpec(),
    )


def on_ranks(work: Callable[[], Any], ranks: int, seconds: float = SECONDS) -> Any:
    """Return what `work` returns at rank 0 of a process group of forked processes.

    Args:
        work: Called by every rank.
        ranks: The number of processes.
        seconds: The time after which they are killed.

    Raises:
        TimeoutError: It took longer.
        RuntimeError: A rank failed; the message is that of its error.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    context = multiprocessing.get_context("fork")
    ours, theirs = context.Pipe(duplex=False)
    started = [
        context.Process(target=_rank, args=(work, rank, ranks, port, theirs), daemon=True)
        for rank in range(ranks)
    ]
    for process in started:
        process.start()
    theirs.close()
    try:
        if not ours.poll(seconds):
            raise TimeoutError(f"not done in {seconds:g} s")
        error, result = ours.recv()
    except EOFError:
        error, result = "a rank has died", None
    finally:
        for process in started:
            process.kill()
            process.join()
    if error:
        raise RuntimeError(error)
    return result


def _rank(work: Callable[[], Any], rank: int, ranks: int, port: int, found: Connection) -> None:
    os.environ.update(
        RANK=str(rank),
        LOCAL_RANK=str(rank),
        WORLD_SIZE=str(ranks),
        MASTER_ADDR="127.0.0.1",
        MASTER_PORT=str(port),
    )
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    try:
        result = "", work()
    except UnsupportedModel as exc:
        result = "", exc
    except FAMILY_ERRORS as exc:
        result = " ".join(f"{type(exc).__name__}: {exc}".split())[:200], None
    if rank == 0:
        found.send(result)
    # The others wait here, since a rank that ends would fail those that still compute.
    with suppress(RuntimeError):
        dist.barrier()


def without_dropout(config: PretrainedConfig) -> PretrainedConfig:
    """Return the config with all of its rates of dropout at 0; ranks draw other masks than one."""
    for name, value in vars(config).items():
        if "drop" in name and isinstance(value, float):
            setattr(config, name, 0.0)
    return config


def trunk_of(whole: PreTrainedModel, run: RunSpec, ranks: int = 1) -> TrunkPart:
    """Return the trunk of an unsplit model with the run's adapters, cut over the ranks."""
    tensors = {name: tensor.clone() for name, tensor in whole.state_dict().items()}
    options = {"attn_implementation": whole.config._attn_implementation, "dtype": whole.dtype}
    config = copy.deepcopy(whole.config)
    trunk = build_trunk(config, run.split, state_dict=tensors, **options, **sharding(ranks))
    add_adapters(trunk, run.lora, run.seed)
    return trunk


def trained(whole: PreTrainedModel, trunk: TrunkPart, run: RunSpec) -> tuple[Any, Tensor]:
    """Train a trunk for some steps, and decode some tokens.

    Returns:
        The state of training, with whole tensors at rank 0, and the tokens [1, T].
    """
    tensors = {name: tensor.clone() for name, tensor in whole.state_dict().items()}
    config = copy.deepcopy(whole.config)
    client = build_client(config, run.split, state_dict=tensors, dtype=whole.dtype)
    add_adapters(client, run.lora, run.seed)
    with TrunkService(trunk, run) as service:
        link = LocalLink(service, token=service.admit("alice"))
        remote = RemoteTrunk(link, client, run, client="alice")
        connect(client, remote)
        trainer = ClientTrainer(client, remote, run)
        with remote.session():
            for step in range(STEPS):
                trainer.step([_batch(step)])
        client.train(False)
        model: Any = client
        tokens_BT: Tensor = model.generate(
            _batch(9).inputs["input_ids"][:1],
            max_new_tokens=TOKENS,
            min_new_tokens=TOKENS,
            do_sample=False,
            pad_token_id=0,
        )
        return service.engine.state(), tokens_BT


def _batch(seed: int) -> Batch:
    ids_BT = torch.randint(3, 60, (2, 12), generator=torch.Generator().manual_seed(seed))
    return Batch(
        inputs={"input_ids": ids_BT, "attention_mask": torch.ones_like(ids_BT)},
        labels=ids_BT,
        num_tokens=22,
        num_bytes=22,
    )


def compared(whole: PreTrainedModel, run: RunSpec, ranks: int) -> dict[str, Any]:
    """Train and decode with the trunk on ranks and in one process; every rank calls this.

    Returns:
        At rank 0: the largest difference of any trained value and moment, whether the tokens are
        equal, and the bytes of this rank's shards over those of the whole trunk.

    Raises:
        UnsupportedModel: The model cannot be cut over these ranks.
    """
    trunk = trunk_of(whole, run, ranks)
    shard_bytes = bytes_of_rank(trunk)
    state, tokens_BT = trained(whole, trunk, run)
    if dist.get_rank():
        return {}
    alone = trunk_of(whole, run)
    share = shard_bytes / bytes_of_rank(alone)
    expected, expected_BT = trained(whole, alone, run)
    assert state.keys() == expected.keys()
    worst = max((state[k] - v).abs().max().item() for k, v in expected.items() if v.numel())
    return {"difference": worst, "tokens": torch.equal(tokens_BT, expected_BT), "share": share}


def bytes_per_rank(whole: PreTrainedModel, ranks: int = 2) -> float:
    """Return the bytes of the weights on a rank over those of the whole trunk."""
    run = run_of(plan_for(type(whole), whole.config).num_blocks)
    shard: int = on_ranks(lambda: bytes_of_rank(trunk_of(whole, run, ranks)), ranks)
    return shard / bytes_of_rank(trunk_of(whole, run))


def judged(whole: PreTrainedModel, ranks: int) -> tuple[bool, str]:
    """Return whether a trunk on ranks equals the one in one process, and how far they differ.

    Raises:
        UnsupportedModel: The model cannot be cut over these ranks.
        RuntimeError: A rank failed.
        TimeoutError: It took too long.
    """
    run = run_of(plan_for(type(whole), whole.config).num_blocks)
    found = on_ranks(lambda: compared(whole, run, ranks), ranks)
    if isinstance(found, UnsupportedModel):
        raise found
    is_exact = found["difference"] <= TOLERANCE and found["tokens"]
    same = "equal" if found["tokens"] else "other"
    return is_exact, f"{found['difference']:.2g}, {same} tokens, {found['share']:.2f} of the bytes"
