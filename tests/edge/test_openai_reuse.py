"""`fedsplit openai` with the caches of answered requests: the same answers, of fewer tokens."""

import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch

from tests.core.worlds import wait_until
from tests.edge.chatting import LANES, MODEL, Chatting, chatting, make_chat_model, prompt_of

SYSTEM = {"role": "system", "content": "Answer as the keeper of a lighthouse would, and be brief."}
CACHE_BYTES = 64 << 20
SOON = "generation.max_queue_delay_s=0.01"
"""For tests in which idle sessions would be waited for."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("reuse") / "model"
    make_chat_model(folder)
    return folder


@pytest.fixture
def here(folder) -> Iterator[Chatting]:
    with chatting(folder, cache_bytes=CACHE_BYTES, settings=[SOON]) as here:
        yield here


def asked(here: Chatting, messages: list[dict[str, Any]], **fields: Any) -> Any:
    fields = {"temperature": 0, "max_tokens": 12, **fields}
    return here.client.chat.completions.create(model=MODEL, messages=messages, **fields)


def cached(answer: Any) -> int:
    return answer.usage.prompt_tokens_details.cached_tokens


def sessions(here: Chatting) -> int:
    return httpx.get(f"{here.url}/health").json()["trunk"]["sessions"]


class Talk:
    """A conversation, of which each answer is the unsplit model's."""

    def __init__(self, here: Chatting, *messages: dict[str, Any]) -> None:
        self.here = here
        self.messages = list(messages)
        self.held: list[int] = []

    def turn(self, line: str, **fields: Any) -> Any:
        """Ask, check the answer, and return it."""
        self.messages.append({"role": "user", "content": line})
        ids_T = prompt_of(self.here.tokenizer, self.messages)
        reply_T = self.here.continued(ids_T, 12, self.here.ends)
        answer = asked(self.here, self.messages, **fields)
        text = answer.choices[0].message.content
        assert text == self.here.text_of(reply_T)
        self.messages.append({"role": "assistant", "content": text})
        self.expected = common(self.held, ids_T)
        # The last token is in the answer, but not in the cache.
        self.held = ids_T + reply_T[:-1]
        return answer


def common(held_T: list[int], ids_T: list[int]) -> int:
    """The first tokens that both have in common."""
    return len(os.path.commonprefix([held_T, ids_T]))


def test_conversations_with_one_system_prompt_go_on_from_caches(here):
    first, second = Talk(here, SYSTEM), Talk(here, SYSTEM)
    assert cached(first.turn("Who are you?")) == 0
    line = "How old is the light?"
    other_T = prompt_of(here.tokenizer, [SYSTEM, {"role": "user", "content": line}])
    shared = common(first.held, other_T)
    assert cached(second.turn(line)) == shared >= 16
    for talk in (first, second, first):
        answer = talk.turn("And then?", logprobs=True)
        assert cached(answer) == talk.expected > shared
    assert sessions(here) == 2
    ids_T = prompt_of(here.tokenizer, first.messages[:-1])
    with torch.no_grad():
        logits_TV = here.model(torch.tensor([ids_T])).logits[0, -1]
    logprob = answer.choices[0].logprobs.content[0].logprob
    assert logprob == pytest.approx(float(logits_TV.log_softmax(-1).max()), abs=1e-4)


def test_choices_stop_strings_and_streams_are_those_of_a_fresh_server(here, folder):
    messages = [SYSTEM, {"role": "user", "content": "Once upon a time"}]
    requests = [
        dict(n=3, temperature=1, seed=5),
        dict(n=2),
        dict(stop=["e"]),
        dict(stream=True, stream_options={"include_usage": True}),
        dict(max_tokens=1),
    ]
    with chatting(folder) as fresh:
        found = [[said(asked(on, messages, **each)) for each in requests] for on in (here, fresh)]
    for (text, spared), (wanted, none) in zip(*found, strict=True):
        assert (text, none) == (wanted, 0)
        assert spared == (
            0 if text is found[0][0][0] else len(prompt_of(here.tokenizer, messages)) - 1
        )


def said(answer: Any) -> tuple[list[str], int]:
    """The text of each choice and the cached tokens, of an answer in pieces too."""
    if not hasattr(answer, "usage"):
        *chunks, last = list(answer)
        text = "".join(each.choices[0].delta.content or "" for each in chunks)
        return [text], cached(last)
    return [choice.message.content for choice in answer.choices], cached(answer)


def test_many_conversations_at_a_time_have_the_texts_that_they_have_alone(here):
    talks = [Talk(here, SYSTEM) for _ in range(LANES)]
    with ThreadPoolExecutor(LANES) as pool:
        for turn in range(3):
            lines = [f"{word} {turn}?" for word in ("Who", "What", "When", "Where")]
            list(pool.map(lambda talk, line: talk.turn(line), talks, lines))
    assert sessions(here) == LANES


def test_a_cancelled_request_leaves_no_cache_and_changes_no_later_one(here):
    talk = Talk(here, SYSTEM)
    talk.turn("Who are you?")
    endless = [*talk.messages, {"role": "user", "content": "Tell me all."}]
    fields = {"stream": True, "logit_bias": {"0": -100}, "max_tokens": 100}
    with asked(here, endless, **fields) as answer:
        next(answer)
    wait_until(lambda: sessions(here) == 0)
    assert cached(talk.turn("Who are you?")) == 0
    assert cached(talk.turn("And then?")) == talk.expected > 0


def test_a_trunk_that_drops_caches_changes_no_text(folder):
    # Each block's keys and values of 64 tokens take 8 KiB; one session has room.
    with chatting(
        folder, cache_bytes=CACHE_BYTES, settings=[SOON, "generation.cache_bytes=20000"]
    ) as here:
        talks = [Talk(here), Talk(here)]
        for turn in range(3):
            for talk in talks:
                talk.turn(f"{'Who' if talk is talks[0] else 'What'} {turn}?")
        assert sessions(here) <= 2


def test_servers_share_no_cache_and_close_their_sessions(here, folder):
    messages = [SYSTEM, {"role": "user", "content": "Who are you?"}]
    assert [cached(asked(here, messages)) > 0 for _ in range(2)] == [False, True]
    with chatting(folder, trunk=here.trunk, cache_bytes=CACHE_BYTES) as other:
        assert [cached(asked(other, messages)) > 0 for _ in range(2)] == [False, True]
        assert sessions(here) == 2
    assert sessions(here) == 1
