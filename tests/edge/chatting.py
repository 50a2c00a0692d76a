"""A tiny chat model whose trunk is served over gRPC, behind an OpenAI-compatible server."""

import secrets
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from openai import OpenAI
from transformers import AutoModelForCausalLM, AutoTokenizer

from fedsplit.config import compose
from fedsplit.openai.server import Binding, serving
from fedsplit.serve import Served, hosted, reach
from fedsplit.spec import WireSpec
from fedsplit.telemetry.prometheus import Prometheus
from fedsplit.telemetry.sinks import Telemetry
from tests.edge.tiny_models import CHATML, make_model

MODEL = "tale"
LANES = 4
QUEUE_S = 5.0
"""How long the trunk's pass waits for a session of the pass before it."""

QUESTION = [{"role": "user", "content": "Once upon a time"}]
"""The conversation whose greedy reply ends with the end-of-turn token."""


def make_chat_model(folder: Path) -> None:
    """Save a tiny model that ends its reply to `QUESTION` with `<|im_end|>`.

    Only its chat template says that this token ends a turn.
    """
    make_model(folder, template=CHATML)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder).eval()
    ids_BT = torch.tensor([prompt_of(tokenizer, QUESTION)])
    reply_T = model.generate(ids_BT, max_new_tokens=60)[0, ids_BT.shape[1] :].tolist()
    last = next(token for i, token in enumerate(reply_T) if i >= 12 and token not in reply_T[:i])
    rows = [tokenizer.convert_tokens_to_ids("<|im_end|>"), last]
    with torch.no_grad():
        model.lm_head.weight[rows] = model.lm_head.weight[rows[::-1]].clone()
    model.save_pretrained(folder)


def prompt_of(tokenizer: Any, messages: Sequence[dict[str, Any]]) -> list[int]:
    """The tokens of a conversation, as transformers makes them."""
    return tokenizer.apply_chat_template(
        list(messages), add_generation_prompt=True, return_dict=True
    )["input_ids"]


@dataclass(frozen=True, kw_only=True)
class Chatting:
    """The server, its clients, and the unsplit model as the judge."""

    folder: Path
    trunk: str
    url: str
    key: str
    client: OpenAI
    model: Any
    tokenizer: Any
    served_tokenizer: Any

    @property
    def ends(self) -> list[int]:
        """The tokens that end a turn."""
        return [0, self.tokenizer.convert_tokens_to_ids("<|im_end|>")]

    def continued(self, ids_T: list[int], tokens: int, ends: Any = 0) -> list[int]:
        """The greedy continuation by the unsplit model."""
        ids_BT = torch.tensor([ids_T])
        out_BT = self.model.generate(ids_BT, max_new_tokens=tokens, eos_token_id=ends)
        return out_BT[0, len(ids_T) :].tolist()

    def text_of(self, ids_T: Sequence[int]) -> str:
        """The text of tokens."""
        return self.tokenizer.decode(ids_T, skip_special_tokens=True)


@contextmanager
def chatting(
    folder: Path, *, trunk: str = "", cache_bytes: int = 0, settings: Sequence[str] = ()
) -> Iterator[Chatting]:
    """Serve a model of `make_chat_model`; its trunk in this process, or at an address."""
    own = settings or [f"generation.max_queue_delay_s={QUEUE_S}"]
    run = compose(["split=1/2/1", "wire.budget_s=60", *own])
    key, sink = secrets.token_hex(8), Prometheus("/metrics ")
    with ExitStack() as stack:
        if not trunk:
            wire = WireSpec(bind="127.0.0.1:0")
            trunk = stack.enter_context(hosted([Served(name=MODEL, model=str(folder))], run, wire))
        telemetry = Telemetry(sink)
        reached = stack.enter_context(reach(str(folder), trunk, run=run, telemetry=telemetry))
        served_tokenizer = AutoTokenizer.from_pretrained(folder)
        address = stack.enter_context(
            serving(
                reached,
                served_tokenizer,
                Binding(address="127.0.0.1:0", api_key=key),
                model=MODEL,
                max_requests=LANES,
                cache_bytes=cache_bytes,
                telemetry=telemetry,
                metrics=sink,
            )
        )
        url = f"http://{address}"
        client = stack.enter_context(OpenAI(base_url=f"{url}/v1", api_key=key, max_retries=0))
        yield Chatting(
            folder=folder,
            trunk=trunk,
            url=url,
            key=key,
            client=client,
            model=AutoModelForCausalLM.from_pretrained(folder).eval(),
            tokenizer=AutoTokenizer.from_pretrained(folder),
            served_tokenizer=served_tokenizer,
        )
