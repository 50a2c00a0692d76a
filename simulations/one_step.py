"""One training step of a split model without Flower, Hydra and network: the file to read first.

    python -m simulations.one_step

A tiny GPT-2 of four blocks is split 1/2/1: the client has the first and the last block (and
embeddings, head, labels), the trunk has the two blocks between them. The program takes one step
through the whole stack (client model, remote layer, codec, trunk service, engine) and one step of
the unsplit model on the same batch, and compares the two.
"""

import torch
from transformers import GPT2Config, GPT2LMHeadModel

from fedsplit.client.remote import RemoteTrunk
from fedsplit.client.trainer import ClientTrainer
from fedsplit.console import quiet_libraries
from fedsplit.data.batches import Batch
from fedsplit.link import LocalLink
from fedsplit.model import connect, join_model, split_model
from fedsplit.optimization import PartOptimizer
from fedsplit.spec import DataSpec, RunSpec, SplitSpec, TrainSpec
from fedsplit.trunk.service import TrunkService


def main() -> None:
    """Take both steps, and print their losses and the largest difference of any weight."""
    quiet_libraries()
    run = RunSpec(
        split=SplitSpec.parse("1/2/1"),
        train=TrainSpec(batch_size=2, clip_norm=0.0),
        data=DataSpec(sequence_length=16),
    )
    torch.manual_seed(run.seed)
    whole = GPT2LMHeadModel(_tiny_gpt2())
    parts = split_model(whole, run.split)
    batch = _batch()

    with TrunkService(parts.trunk, run) as service:  # the server has the trunk
        link = LocalLink(service, token=service.admit("alice"))
        trunk = RemoteTrunk(link, parts.client, run, client="alice")
        connect(parts.client, trunk)  # to the client, the trunk is a layer
        trainer = ClientTrainer(parts.client, trunk, run)
        with trunk.session():
            split_loss = trainer.step([batch]).loss

    # The same step in plain PyTorch, with the same optimizer.
    optimizer = PartOptimizer(dict(whole.named_parameters()), run.train)
    loss = whole(**batch.inputs, labels=batch.labels).loss
    loss.backward()
    optimizer.step(0)

    again = join_model(parts.client, parts.trunk).state_dict()
    diff = max((again[k] - w).abs().max().item() for k, w in whole.state_dict().items())
    print(f"split loss   {split_loss:.6f}   (bottom and top at the client, trunk elsewhere)")
    print(f"unsplit loss {loss.item():.6f}   (the same model in one piece)")
    print(f"largest difference of any weight after the step: {diff}")


def _tiny_gpt2() -> GPT2Config:
    return GPT2Config(
        n_layer=4,
        n_embd=32,
        n_head=4,
        vocab_size=256,
        n_positions=16,
        resid_pdrop=0.0,
        embd_pdrop=0.0,
        attn_pdrop=0.0,
    )


def _batch() -> Batch:
    ids_BT = torch.tensor([list(b"one step of a sp"), list(b"lit model, exact")])
    return Batch(
        inputs={"input_ids": ids_BT, "attention_mask": torch.ones_like(ids_BT)},
        labels=ids_BT,
        num_tokens=30,
        num_bytes=30,
    )


if __name__ == "__main__":
    main()
