"""Two clients that train with a trunk of `fedsplit serve`, in a process of the crash matrix.

python -m simulations.faults.served_clients FOLDER ADDRESS
"""

import sys
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor
from transformers import GPT2Config, GPT2LMHeadModel

from fedsplit.client.trainer import ClientTrainer
from fedsplit.config import compose
from fedsplit.console import quiet_libraries
from fedsplit.data import Batch
from fedsplit.errors import ConnectionLost
from fedsplit.serve import Reached, StateFolder, reach

FIELDS = (
    "train.lr=0.01",
    "train.warmup_steps=0",
    "train.batch_size=2",
    "data.sequence_length=12",
    "wire.budget_s=120",
)
"""The settings of both sides."""
SPLIT, SAVE_EVERY = "1/2/1", 4
_STEPS, _NAMES = 12, ("alice", "bob")
_START_S = 120.0
_VOCABULARY = 64


def make_model(folder: Path) -> None:
    """Write a small model with random weights, and with dropout."""
    torch.manual_seed(0)
    config = GPT2Config(n_layer=4, n_embd=16, n_head=2, vocab_size=_VOCABULARY, n_positions=16)
    GPT2LMHeadModel(config).save_pretrained(folder)


def main(folder: Path, address: str) -> None:
    """Train both clients, and write their weights to `clients.safetensors`."""
    quiet_libraries()
    run = compose([f"split={SPLIT}", *FIELDS])
    with ExitStack() as opened:
        clients: dict[str, Reached] = {}
        deadline = time.monotonic() + _START_S
        while len(clients) < len(_NAMES):
            name = _NAMES[len(clients)]
            try:
                reached = reach(str(folder / "model"), address, run=run, client=name)
            except ConnectionLost:  # it is starting
                if time.monotonic() > deadline:
                    raise
                time.sleep(0.1)
                continue
            clients[name] = opened.enter_context(reached)
        for reached in clients.values():
            reached.trunk.open()  # so that the first step waits for both

        def fit(name: str) -> dict[str, Tensor]:
            trainer = ClientTrainer(clients[name].model, clients[name].trunk, run)
            first = 100 * _NAMES.index(name)
            states = StateFolder(folder / "states" / name, run, name)
            trainer.fit([[_batch(first + number)] for number in range(_STEPS)], states=states)
            return _weights(name, clients[name])

        with ThreadPoolExecutor() as pool:
            both = list(pool.map(fit, _NAMES))
    save_file({**both[0], **both[1]}, folder / "clients.safetensors")


def _weights(name: str, reached: Reached) -> dict[str, Tensor]:
    # Cloned, because safetensors refuses tensors that share memory.
    return {f"{name}/{key}": p.detach().clone() for key, p in reached.model.named_parameters()}


def _batch(seed: int) -> Batch:
    ids_BT = torch.randint(1, _VOCABULARY, (2, 12), generator=torch.Generator().manual_seed(seed))
    num_tokens = ids_BT[:, 1:].numel()
    return Batch(
        inputs={"input_ids": ids_BT, "attention_mask": torch.ones_like(ids_BT)},
        labels=ids_BT,
        num_tokens=num_tokens,
        num_bytes=num_tokens,
        examples_B=2 * seed + torch.arange(2),
    )


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2])
