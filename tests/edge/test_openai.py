"""`fedsplit openai` with the `openai` package: the unsplit model's text, and OpenAI's answers."""

import asyncio
import io
import json
import re
import signal
import socket
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch
from openai import APIError, APIStatusError, APITimeoutError, OpenAI
from transformers import GenerationConfig

from fedsplit.cli import main
from fedsplit.errors import ConfigError
from fedsplit.openai.app import Api
from fedsplit.openai.generation import Writer as Answers
from fedsplit.openai.lanes import Cancelled, Lanes
from fedsplit.openai.requests import TextRequest
from fedsplit.openai.sampling import GumbelNoise, processors
from fedsplit.openai.server import Binding
from fedsplit.serve import reach
from fedsplit.serve.chat import Conversation, Writer
from tests.core.worlds import wait_until
from tests.edge.chatting import (
    LANES,
    MODEL,
    QUESTION,
    Chatting,
    chatting,
    make_chat_model,
    prompt_of,
)
from tests.edge.forked import Program
from tests.edge.processes import free_ports

ENDLESS = {"model": MODEL, "temperature": 0, "logit_bias": {"0": -100}, "max_tokens": 240}
ENDLESS |= {"prompt": ["Once"] * 20}
"""Completions that take far longer than any test."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("openai") / "model"
    make_chat_model(folder)
    return folder


@pytest.fixture(scope="module")
def here(folder) -> Iterator[Chatting]:
    with chatting(folder) as here:
        yield here


def chat(here: Chatting, **fields: Any) -> Any:
    fields = {"model": MODEL, "messages": QUESTION, "temperature": 0, "max_tokens": 30, **fields}
    return here.client.chat.completions.create(**fields)


def complete(here: Chatting, **fields: Any) -> Any:
    fields = {"model": MODEL, "prompt": "Once", "temperature": 0, "max_tokens": 12, **fields}
    return here.client.completions.create(**fields)


def posted(here: Chatting, path: str = "/v1/completions", **options: Any) -> httpx.Response:
    headers = {"Authorization": f"Bearer {here.key}", "Content-Type": "application/json"}
    headers |= options.pop("headers", {})
    return httpx.post(f"{here.url}{path}", headers=headers, timeout=30.0, **options)


def sessions(here: Chatting) -> int:
    return httpx.get(f"{here.url}/health").json()["trunk"]["sessions"]


def metrics(here: Chatting) -> str:
    headers = {"Authorization": f"Bearer {here.key}"}
    return httpx.get(f"{here.url}/metrics", headers=headers).text


# --- the unsplit model's text -----------------------------------------------------------------

CONVERSATIONS = {
    "question": QUESTION,
    "system": [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hello"}],
    "developer": [{"role": "developer", "content": "Be brief."}, *QUESTION],
    "turns": [
        {"role": "user", "content": "one"},
        {"role": "assistant", "content": "two"},
        {"role": "user", "content": "three"},
    ],
    "parts": [
        {
            "role": "user",
            "content": [{"type": "text", "text": "Good "}, {"type": "text", "text": "day"}],
        }
    ],
}


def as_read(messages: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """A conversation as a template gets it."""
    roles = {"developer": "system"}
    contents = [each["content"] for each in messages]
    texts = [c if isinstance(c, str) else "".join(part["text"] for part in c) for c in contents]
    return [
        {"role": roles.get(each["role"], each["role"]), "content": text}
        for each, text in zip(messages, texts, strict=True)
    ]


@pytest.mark.parametrize("stream", [False, True], ids=["whole", "stream"])
@pytest.mark.parametrize("messages", CONVERSATIONS.values(), ids=CONVERSATIONS)
def test_a_chat_has_the_greedy_text_of_the_unsplit_model(here, messages, stream):
    ids_T = prompt_of(here.tokenizer, as_read(messages))
    reply_T = here.continued(ids_T, 30, here.ends)
    answer = chat(here, messages=messages, stream=stream)
    if stream:
        chunks = list(answer)
        assert chunks[0].choices[0].delta.role == "assistant"
        text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks)
        finish = chunks[-1].choices[0].finish_reason
    else:
        usage = answer.usage.prompt_tokens, answer.usage.completion_tokens
        assert usage == (len(ids_T), len(reply_T))
        text, finish = answer.choices[0].message.content, answer.choices[0].finish_reason
    assert text == here.text_of(reply_T)
    assert finish == ("stop" if reply_T[-1] in here.ends else "length")
    # Only the template says that this token ends a turn.
    assert messages is not QUESTION or reply_T[-1] == here.ends[1]


PROMPTS = {
    "text": "Once upon a time",
    "texts": ["Once", "There was a king"],
    "tokens": [70, 71, 72],
    "several": [[70, 71], [80, 81, 82, 83]],
}


@pytest.mark.parametrize("stream", [False, True], ids=["whole", "stream"])
@pytest.mark.parametrize("prompt", PROMPTS.values(), ids=PROMPTS)
def test_a_completion_has_the_greedy_text_of_the_unsplit_model(here, prompt, stream):
    several = isinstance(prompt, list) and not isinstance(prompt[0], int)
    prompts = prompt if several else [prompt]
    tokens = [here.tokenizer(p)["input_ids"] if isinstance(p, str) else p for p in prompts]
    replies = [here.continued(ids_T, 12) for ids_T in tokens]
    answer = complete(here, prompt=prompt, stream=stream)
    texts = dict.fromkeys(range(len(prompts)), "")
    for part in answer if stream else [answer]:
        for choice in part.choices:
            texts[choice.index] += choice.text
    assert list(texts.values()) == [here.text_of(reply_T) for reply_T in replies]
    if not stream:
        assert answer.usage.prompt_tokens == sum(map(len, tokens))
        assert answer.usage.completion_tokens == sum(map(len, replies))


def test_requests_at_once_have_the_texts_that_they_have_alone(here):
    conversations = list(CONVERSATIONS.values())[:LANES]
    with ThreadPoolExecutor(LANES) as pool:
        answers = list(pool.map(lambda each: chat(here, messages=each), conversations))
    for messages, answer in zip(conversations, answers, strict=True):
        reply_T = here.continued(prompt_of(here.tokenizer, as_read(messages)), 30, here.ends)
        assert answer.choices[0].message.content == here.text_of(reply_T)


@pytest.mark.parametrize("name", ["max_tokens", "max_completion_tokens"])
def test_the_number_of_new_tokens_is_bounded(here, name):
    fields = {"max_tokens": None, name: 5}
    answer = chat(here, **fields)
    assert answer.choices[0].finish_reason == "length"
    assert answer.usage.completion_tokens == 5


@pytest.mark.parametrize("stream", [False, True], ids=["whole", "stream"])
def test_a_stop_string_ends_a_text_before_it(here, stream):
    """It begins inside of one token and ends inside of another."""
    ids_T = here.continued(here.tokenizer("Once")["input_ids"], 12)
    text = here.text_of(ids_T)
    stop = text[3:7]
    assert len(stop) == 4 and all(stop not in here.text_of([each]) for each in ids_T)
    answer = complete(here, stop=["never", stop], stream=stream)
    choices = [part.choices[0] for part in answer] if stream else answer.choices
    assert "".join(choice.text for choice in choices) == text[: text.index(stop)]
    assert choices[-1].finish_reason == "stop"


def test_an_answer_in_pieces_ends_with_its_usage_and_done(here):
    fields = {**ENDLESS, "prompt": "Once", "max_tokens": 4, "stream": True}
    fields |= {"stream_options": {"include_usage": True}}
    events = posted(here, json=fields).text.strip().split("\n\n")
    *chunks, usage = [json.loads(event.removeprefix("data: ")) for event in events[:-1]]
    assert events[-1] == "data: [DONE]"
    assert all(chunk["usage"] is None and len(chunk["choices"]) == 1 for chunk in chunks)
    assert usage["choices"] == [] and usage["usage"]["completion_tokens"] == 4


# --- sampling ---------------------------------------------------------------------------------


def test_a_seed_decides_the_text_also_among_other_requests(here):
    alone = chat(here, temperature=1, seed=7, n=2)
    texts = [choice.message.content for choice in alone.choices]
    assert len(set(texts)) == 2
    with ThreadPoolExecutor(LANES) as pool:
        seeds = [7, 8, 7, None]
        found = list(pool.map(lambda seed: chat(here, temperature=1, seed=seed, n=2), seeds))
    again = [[choice.message.content for choice in each.choices] for each in found]
    assert again[0] == again[2] == texts
    assert len({str(each) for each in again}) == 3


def test_noise_draws_each_token_with_its_probability():
    torch.manual_seed(0)
    scores_BV = torch.randn(1, 6).expand(20_000, 6).contiguous()
    scores_BV[:, 5] = -torch.inf
    drawn_B = GumbelNoise(3)(torch.empty(0), scores_BV).argmax(dim=-1)
    share_V = drawn_B.bincount(minlength=6) / len(drawn_B)
    torch.testing.assert_close(share_V, scores_BV[0].softmax(dim=-1), atol=0.015, rtol=0)
    assert share_V[5] == 0


@pytest.mark.parametrize("options", [{"top_p": 0.001}, {"temperature": 1e-40}], ids=str)
def test_the_most_likely_token_is_what_a_small_top_p_or_temperature_leaves(here, options):
    greedy, sampled = chat(here), chat(here, **{"temperature": 1.5, **options})
    assert greedy.choices[0].message.content == sampled.choices[0].message.content


def test_the_model_s_own_sampling_counts_where_a_request_leaves_it_open():
    own = GenerationConfig(do_sample=True, temperature=0.5, top_k=3)
    asked = TextRequest(model=MODEL, prompt="a", seed=1)
    chain, _ = processors(asked, own, prompt=1, vocabulary=9)
    assert [type(each).__name__ for each in chain] == [
        "TemperatureLogitsWarper",
        "TopKLogitsWarper",
        "GumbelNoise",
    ]
    plain, _ = processors(asked, GenerationConfig(), prompt=1, vocabulary=9)
    assert [type(each).__name__ for each in plain] == ["GumbelNoise"]


def test_a_bias_forces_a_token_and_forbids_another(here):
    token = here.tokenizer("x")["input_ids"][0]
    assert complete(here, logit_bias={str(token): 100}, max_tokens=3).choices[0].text == "xxx"
    first = here.continued(here.tokenizer("Once")["input_ids"], 1)
    answer = complete(here, logit_bias={str(first[0]): -100}, max_tokens=1, logprobs=1)
    assert answer.choices[0].text != here.text_of(first)


@pytest.mark.parametrize(
    "penalty", [{"frequency_penalty": 2.0}, {"presence_penalty": 2.0}], ids=str
)
def test_penalties_are_those_of_openai_s_reference(here, penalty):
    ids = here.tokenizer("Once")["input_ids"]
    count_V, reply_T = torch.zeros(len(here.tokenizer)), []
    for _ in range(16):
        with torch.no_grad():
            scores_V = here.model(torch.tensor([ids + reply_T])).logits[0, -1]
        scores_V -= count_V * penalty.get("frequency_penalty", 0.0)
        scores_V -= (count_V > 0) * penalty.get("presence_penalty", 0.0)
        reply_T.append(int(scores_V.argmax()))
        count_V[reply_T[-1]] += 1
    assert complete(here, max_tokens=16, **penalty).choices[0].text == here.text_of(reply_T)
    assert reply_T != here.continued(ids, 16)


def test_log_probabilities_are_those_of_the_unsplit_model(here):
    ids = prompt_of(here.tokenizer, QUESTION)
    reply_T = here.continued(ids, 6, here.ends)
    with torch.no_grad():
        logits_TV = here.model(torch.tensor([ids + reply_T])).logits[0, len(ids) - 1 : -1]
    wanted_TV = logits_TV.log_softmax(dim=-1)
    for temperature in (0, 1.3):
        options = {"logit_bias": {str(t): 100 for t in reply_T[:1]}} if temperature else {}
        answer = chat(
            here, max_tokens=6, logprobs=True, top_logprobs=2, temperature=temperature, **options
        )
        content = answer.choices[0].logprobs.content
        assert content[0].logprob == pytest.approx(float(wanted_TV[0, reply_T[0]]), abs=1e-4)
        for each in content:
            # The bytes of a part of a character are not those of the mark that stands for it.
            assert each.bytes == (None if "\ufffd" in each.token else list(each.token.encode()))
        assert len(content) == 6 and all(len(each.top_logprobs) == 2 for each in content)
        if not temperature:
            got_T = torch.tensor([each.logprob for each in content])
            torch.testing.assert_close(got_T, wanted_TV.max(dim=-1).values)
    forced = {str(here.tokenizer("x")["input_ids"][0]): 100}
    answer = chat(here, max_tokens=1, logprobs=True, logit_bias=forced)
    assert answer.choices[0].logprobs.content[0].bytes == [ord("x")]
    same = here.client.completions.create(
        model=MODEL, prompt=ids, temperature=0, max_tokens=6, logprobs=2, stream=True
    )
    parts = [chunk.choices[0].logprobs for chunk in same if chunk.choices[0].logprobs]
    values = [value for part in parts for value in part.token_logprobs]
    torch.testing.assert_close(torch.tensor(values), wanted_TV.max(dim=-1).values)
    assert parts[0].text_offset[0] == 0


# --- what is refused --------------------------------------------------------------------------

REFUSED = {
    "tools": [{"type": "function", "function": {"name": "f"}}],
    "tool_choice": "required",
    "functions": [{"name": "f"}],
    "response_format": {"type": "json_object"},
    "modalities": ["text", "audio"],
    "audio": {"voice": "alloy", "format": "wav"},
}


@pytest.mark.parametrize("name", REFUSED)
def test_a_field_that_cannot_be_served_is_refused(here, name):
    with pytest.raises(APIStatusError) as caught:
        chat(here, **{name: REFUSED[name]})
    assert (caught.value.status_code, caught.value.param) == (400, name)
    assert caught.value.code == "unsupported_parameter"


@pytest.mark.parametrize("field", [{"suffix": "x"}, {"echo": True}, {"best_of": 3}], ids=str)
def test_a_field_of_completions_that_cannot_be_served_is_refused(here, field):
    with pytest.raises(APIStatusError) as caught:
        complete(here, **field)
    assert caught.value.code == "unsupported_parameter"


def test_fields_without_effect_are_ignored(here):
    more = {"tools": [], "tool_choice": "none", "response_format": {"type": "text"}}
    answer = chat(here, **more, user="me", extra_body={"top_k": 3, "unknown": {"a": 1}})
    assert answer.choices[0].message.content == chat(here).choices[0].message.content


INVALID = {
    "temperature": ({"temperature": 3}, "temperature: .*less than or equal to 2 .*3 was sent"),
    "n": ({"n": 0}, "n: .*greater than or equal to 1"),
    "stop": ({"stop": [""]}, r"stop\[0\]: .*at least 1"),
    "prompt": ({"prompt": ""}, "a prompt is empty"),
    "bias": ({"logit_bias": {"999": 1}}, "the token '999'; the model has the tokens 0 to 301"),
    "digits": ({"logit_bias": {"9" * 5000: 1}}, "the token '99999999999999999999'; the model has"),
    "large": ({"prompt": [1 << 40]}, f"number {1 << 40}, but the model's embedding has"),
    "token": ({"prompt": [5, 999]}, "number 999, but the model's embedding has 302 rows"),
    "long": ({"prompt": [5] * 300}, "has 256 positions, but the prompt has 300 tokens and 12 new"),
    "limit": ({"max_tokens": 256}, "has 256 positions, but the prompt has . tokens and 256 new"),
}


@pytest.mark.parametrize("fields, text", INVALID.values(), ids=INVALID)
def test_an_invalid_field_is_named_with_what_was_sent(here, fields, text):
    for stream in (False, True):
        with pytest.raises(APIStatusError, match=text) as caught:
            complete(here, **fields, stream=stream)
        assert caught.value.status_code == 400
        assert caught.value.type == "invalid_request_error"


BODIES = {
    "no JSON": (b"{", "invalid_json"),
    "no object": (b"[]", "invalid_json"),
    "no model": (b'{"prompt": "a"}', "invalid_value"),
    "deep": (b'{"a":' + b"[" * 100_000 + b"]" * 100_000 + b"}", "invalid_json"),
    "surrogate": (b'{"model": "tale", "prompt": "\\ud800"}', "invalid_json"),
}


@pytest.mark.parametrize("body, code", BODIES.values(), ids=BODIES)
def test_a_body_that_cannot_be_read_is_refused(here, body, code):
    answer = posted(here, content=body)
    assert (answer.status_code, answer.json()["error"]["code"]) == (400, code)


def test_a_caller_that_leaves_within_its_body_is_no_fault_of_the_server(here, caplog):
    before = metrics(here).count("disconnected")
    host, port = here.url.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port))) as caller:
        head = f"POST /v1/completions HTTP/1.1\r\nHost: a\r\nAuthorization: Bearer {here.key}\r\n"
        head += "Content-Type: application/json\r\nContent-Length: 9\r\n\r\n{"
        caller.sendall(head.encode())
    wait_until(lambda: metrics(here).lower().count("disconnected") > before)
    assert not caplog.records


def test_a_body_is_bounded_and_sent_as_json(here):
    answer = posted(here, content=b" " * ((4 << 20) + 1))
    assert (answer.status_code, answer.json()["error"]["code"]) == (413, "request_too_large")
    form = posted(here, content=b"{}", headers={"Content-Type": "text/plain"})
    assert (form.status_code, form.json()["error"]["code"]) == (400, "invalid_content_type")


def test_a_model_or_path_that_is_not_there_is_not_found(here):
    for call in (lambda: chat(here, model="gpt-4"), lambda: here.client.models.retrieve("gpt-4")):
        with pytest.raises(APIStatusError, match="'gpt-4' is not served here.*'tale'") as caught:
            call()
        assert (caught.value.status_code, caught.value.code) == (404, "model_not_found")
    answer = posted(here, "/v1/embeddings", json={})
    assert (answer.status_code, answer.json()["error"]["code"]) == (404, "not_found")


def test_a_caller_without_the_key_is_refused(here):
    stranger = OpenAI(base_url=f"{here.url}/v1", api_key="wrong", max_retries=0)
    with stranger, pytest.raises(APIStatusError, match="the API key is wrong") as caught:
        stranger.models.list()
    assert (caught.value.status_code, caught.value.code) == (401, "invalid_api_key")
    assert httpx.get(f"{here.url}/metrics").status_code == 401


HOSTS = {
    "localhost:8000": 200,
    "127.0.0.1": 200,
    "[::1]:8000": 200,
    "here.example": 403,
    "localhost.example": 403,
    "[::1": 403,
}


@pytest.mark.parametrize("host, status", HOSTS.items(), ids=HOSTS)
def test_without_a_key_only_names_of_this_machine_are_answered(host, status):
    unused: Any = None
    api = Api(unused, model=MODEL, api_key="", trunk_info=unused, metrics=unused)

    async def asked() -> httpx.Response:
        transport = httpx.ASGITransport(api.app())
        async with httpx.AsyncClient(transport=transport, base_url="http://here") as client:
            return await client.get("/v1/models", headers={"Host": host})

    answer = asyncio.run(asked())
    assert answer.status_code == status
    assert status == 200 or answer.json()["error"]["code"] == "wrong_host"


def test_a_request_beyond_the_lanes_is_told_to_wait(here):
    streams = [here.client.completions.create(**ENDLESS, stream=True)]
    try:
        for _ in range(LANES - 1):
            streams.append(here.client.completions.create(**ENDLESS, stream=True))
        with pytest.raises(APIStatusError, match=f"answers {LANES} requests at a time") as caught:
            complete(here)
        assert caught.value.status_code == 429
        assert caught.value.response.headers["retry-after"] == "1"
    finally:
        for stream in streams:
            stream.close()
    wait_until(lambda: sessions(here) == 0)
    assert complete(here).choices[0].finish_reason


def test_a_tokenizer_without_a_template_completes_only(here, monkeypatch):
    monkeypatch.setattr(here.served_tokenizer, "chat_template", None)
    with pytest.raises(APIStatusError, match="has no chat template.*use /v1/completions") as caught:
        chat(here)
    assert (caught.value.status_code, caught.value.code) == (400, "no_chat_template")


def test_a_template_refuses_a_conversation(here, monkeypatch):
    template = "{{ raise_exception('roles must alternate') }}"
    monkeypatch.setattr(here.served_tokenizer, "chat_template", template)
    with pytest.raises(APIStatusError, match="template refuses .* roles must alternate") as caught:
        chat(here)
    assert (caught.value.status_code, caught.value.code) == (400, "config")


# --- the server -------------------------------------------------------------------------------


def test_the_model_is_listed(here):
    assert [model.id for model in here.client.models.list()] == [MODEL]
    assert here.client.models.retrieve(MODEL).owned_by == "fedsplit"


def test_health_asks_the_trunk_and_metrics_count_requests(here):
    complete(here)
    health = httpx.get(f"{here.url}/health").json()
    assert (health["status"], health["trunk"]["family"]) == ("ok", "llama")
    text = metrics(here)
    counted = re.search(r'fedsplit_requests_total\{code="OK",kind="completion"\} (\S+)', text)
    first = re.search(r"fedsplit_client_time_to_first_token_seconds_count (\S+)", text)
    assert float(counted[1]) >= 1 and float(first[1]) >= 1


def test_the_session_of_a_client_that_leaves_a_stream_is_freed(here):
    wait_until(lambda: sessions(here) == 0)
    with here.client.completions.create(**ENDLESS, stream=True) as answer:
        next(answer)
        assert sessions(here) == 1
    wait_until(lambda: sessions(here) == 0, timeout_s=1.0)


def test_the_session_of_a_client_that_does_not_wait_is_freed(here):
    wait_until(lambda: sessions(here) == 0)
    with ThreadPoolExecutor() as pool:
        asked = pool.submit(here.client.completions.create, **ENDLESS, timeout=0.5)
        wait_until(lambda: sessions(here) == 1)
        assert isinstance(asked.exception(), APITimeoutError)
        wait_until(lambda: sessions(here) == 0, timeout_s=1.0)


def test_the_session_of_a_client_that_leaves_while_the_trunk_waits_is_freed(here):
    """The next pass waits for another session, which was in the last one."""
    wait_until(lambda: sessions(here) == 0)
    with reach(str(here.folder), here.trunk) as other:
        with here.client.completions.create(**ENDLESS, stream=True) as answer:
            next(answer)
            cache = other.model.new_cache()
            with torch.no_grad():
                other.model(torch.tensor([[5, 6]]), past_key_values=cache)
            assert sessions(here) == 2
        wait_until(lambda: sessions(here) == 1, timeout_s=1.0)


def test_a_generation_that_is_cancelled_does_not_pass_for_a_finished_one(here):
    """It is cancelled while no request is at the trunk."""
    asked = TextRequest(model=MODEL, prompt="Once", temperature=0.0, max_tokens=12)
    with reach(str(here.folder), here.trunk) as reached, closing(Lanes(reached, 1)) as lanes:
        lane = lanes.take()
        answers = Answers(reached.model, here.tokenizer, reached.drafts(), cache_bytes=0)
        with pytest.raises(Cancelled), lanes.using(lane):
            answers.write(asked, lane, lambda piece: lane.cancel(lane.turn))


def test_a_chat_on_a_terminal_ends_its_turns(here):
    out = io.StringIO()
    options = {"max_new_tokens": 60, "do_sample": False}
    with reach(str(here.folder), here.trunk) as reached:
        writer = Writer(reached=reached, tokenizer=here.tokenizer, options=options, out=out)
        conversation = Conversation(writer)
        conversation.answer(QUESTION[0]["content"])
        conversation.answer("and then?")
    held_T = prompt_of(here.tokenizer, QUESTION)
    first_T = here.continued(held_T, 60, here.ends)
    assert first_T[-1] == here.ends[1]
    text = "\n<|im_start|>user\nand then?<|im_end|>\n<|im_start|>assistant\n"
    held_T += first_T + here.tokenizer(text)["input_ids"]
    second_T = here.continued(held_T, 60, here.ends)
    assert out.getvalue() == f"{here.text_of(first_T)}\n{here.text_of(second_T)}\n"


# --- processes --------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_trunk_that_is_killed_and_started_again_changes_no_text(folder):
    address = f"127.0.0.1:{free_ports(1)[0]}"
    words = ["serve", "--model", f"{MODEL}={folder}", "--split", "1/2/1", "--bind", address]
    trunk = Program("fedsplit", *words)
    assert trunk.stdout.readline().startswith("serving")
    try:
        with chatting(folder, trunk=address) as here:
            ids_T = here.tokenizer("Once")["input_ids"]
            fields = {**ENDLESS, "prompt": ids_T, "max_tokens": 200}
            answer = here.client.completions.create(**fields, stream=True)
            parts = [next(answer).choices[0].text for _ in range(5)]
            trunk.kill()
            trunk.end()
            trunk = Program("fedsplit", *words)
            parts += [chunk.choices[0].text for chunk in answer]
            whole_BT = here.model.generate(
                torch.tensor([ids_T]), max_new_tokens=200, suppress_tokens=[0]
            )
            assert "".join(parts) == here.text_of(whole_BT[0, len(ids_T) :])
            assert re.search(r"client_retries_total\S+ [1-9]", metrics(here))
            trunk.kill()
            trunk.end()
            with pytest.raises(APIStatusError, match="no trunk answers|no process") as caught:
                complete(here)
            assert caught.value.status_code == 503
            assert httpx.get(f"{here.url}/health").status_code == 503
    finally:
        trunk.kill()


@pytest.mark.slow
def test_the_command_serves_until_it_is_stopped(here, tmp_path):
    (tmp_path / "key").write_text("secret\n")
    source = ["--trunk", here.trunk, "--model", here.folder, "--api-key-file", tmp_path / "key"]
    with Program("fedsplit", "openai", *source, "--bind", "127.0.0.1:0") as server:
        ready = re.match(r"serving model at (http://\S+/v1); try: curl", server.stdout.readline())
        with OpenAI(base_url=ready[1], api_key="secret", max_retries=0) as client:
            fields = {"messages": QUESTION, "temperature": 0, "stream": True}
            answer = client.chat.completions.create(model="model", **fields)
            text = "".join(chunk.choices[0].delta.content or "" for chunk in answer)
            endless = client.completions.create(**{**ENDLESS, "model": "model"}, stream=True)
            next(endless)
            server.send_signal(signal.SIGTERM)
            with pytest.raises(APIError, match="was cancelled"):
                list(endless)
        code, _, errors = server.end()
    ids_T = prompt_of(here.tokenizer, QUESTION)
    assert text == here.text_of(here.continued(ids_T, 60, here.ends))
    assert (code, errors) == (0, "")


def test_other_machines_need_a_key(folder, capfd):
    assert main(["openai", "--model", str(folder), "--bind", "0.0.0.0:0"]) == 1
    assert "--bind 0.0.0.0:0 is reached from other machines" in capfd.readouterr().err
    Binding(address="0.0.0.0:8000", api_key="x")
    for address in ("127.0.0.1", "127.0.0.1:99999", ":1"):
        with pytest.raises(ConfigError, match=f"--bind {address} is not host:port"):
            Binding(address=address)
