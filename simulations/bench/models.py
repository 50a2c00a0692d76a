"""The model of a benchmark: a GPT-2 of some size, with the same random weights in every process.

Shapes: B sequences, T tokens.
"""

from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor
from transformers import GPT2Config, PreTrainedModel

from fedsplit.data.batches import Batch
from fedsplit.model import ClientPart, TrunkPart, build_client, build_trunk
from fedsplit.model.build import initial_whole
from fedsplit.model.lora import add_adapters
from fedsplit.spec import DataSpec, LoraSpec, PolicySpec, RunSpec, SplitSpec, TrainSpec

P = TypeVar("P", bound=PreTrainedModel)

DEADLINE_S = 600.0
"""The deadline of a step, which waits for all of many clients on one slow machine."""

PASS_WAIT_S = 20.0
"""Long enough for all clients: in the benchmarks none fails, and a step waits for all anyway."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Shape:
    """A GPT-2 without dropout, and its split; `rows` and `tokens` are those of its largest batch.

    With a `lora_rank`, adapters train in place of all weights. `together` is the number of clients
    that share a pass of the trunk, and `clients` the most that train.
    """

    blocks: int
    hidden: int
    heads: int
    vocabulary: int
    split: str
    rows: int = 8
    tokens: int = 1024
    micro_batches: int = 1
    seed: int = 0
    lora_rank: int = 0
    together: int = 1
    clients: int = 16

    @property
    def run(self) -> RunSpec:
        """The configuration of client and trunk."""
        return RunSpec(
            seed=self.seed,
            clients=self.clients,
            split=SplitSpec.parse(self.split),
            data=DataSpec(sequence_length=self.tokens),
            train=TrainSpec(
                batch_size=self.rows,
                micro_batches=self.micro_batches,
                clients_per_pass=self.together,
                max_queue_delay_s=PASS_WAIT_S,
            ),
            lora=LoraSpec(enabled=self.lora_rank > 0, rank=max(1, self.lora_rank)),
            policy=PolicySpec(deadline_s=DEADLINE_S),
        )

    def whole(self) -> PreTrainedModel:
        """Return the unsplit model, which has no token that ends a text."""
        config = GPT2Config(
            n_layer=self.blocks,
            n_embd=self.hidden,
            n_head=self.heads,
            vocab_size=self.vocabulary,
            n_positions=self.tokens,
            resid_pdrop=0.0,
            embd_pdrop=0.0,
            attn_pdrop=0.0,
            bos_token_id=None,
            eos_token_id=None,
            pad_token_id=0,
        )
        whole = initial_whole(config, self.seed)
        whole.eval()
        return whole

    def smashed(self, rows: int, tokens: int) -> Tensor:
        """Return random hidden states, [rows, tokens, hidden]; the same in every call."""
        chance = torch.Generator().manual_seed(self.seed)
        return torch.randn(rows, tokens, self.hidden, generator=chance)

    def batch(self) -> Batch:
        """Return a batch of the largest size with random tokens; the same in every call."""
        chance = torch.Generator().manual_seed(self.seed)
        ids_BT = torch.randint(self.vocabulary, (self.rows, self.tokens), generator=chance)
        return Batch(
            inputs={"input_ids": ids_BT, "attention_mask": torch.ones_like(ids_BT)},
            labels=ids_BT,
            num_tokens=self.rows * (self.tokens - 1),
            num_bytes=ids_BT.numel(),
        )

    def client(self) -> ClientPart:
        """Return the client's part."""
        whole = self.whole()
        client = build_client(whole.config, self.run.split, state_dict=whole.state_dict())
        return self.adapted(client)

    def trunk(self) -> TrunkPart:
        """Return the trunk's part."""
        whole = self.whole()
        trunk = build_trunk(whole.config, self.run.split, state_dict=whole.state_dict())
        return self.adapted(trunk)

    def adapted(self, model: P) -> P:
        """Add adapters to a model if `lora_rank` is not 0, and return the model."""
        if self.lora_rank:
            add_adapters(model, self.run.lora, self.seed)
        return model


def text_of(model: Any, prompt_BT: Tensor, new_tokens: int, **how: Any) -> Tensor:
    """Return a prompt and the tokens that a model generates after it."""
    text_BT: Tensor = model.generate(prompt_BT, max_new_tokens=new_tokens, **how)
    return text_BT


GPT2_SMALL = Shape(blocks=12, hidden=768, heads=12, vocabulary=50257, split="1/10/1")
TOY = Shape(blocks=4, hidden=32, heads=2, vocabulary=128, split="1/2/1", tokens=128)
