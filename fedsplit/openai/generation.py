"""One request's generation: prompts become tokens, and tokens pieces of text for its choices.

It runs in a thread of its own, by `generate` of transformers, so its greedy text is that of the
unsplit model. Shapes: B sequences, T tokens.
"""

from collections.abc import Callable, Iterator
from typing import Any

import torch
from transformers import PreTrainedTokenizerFast, StoppingCriteriaList

from fedsplit.client.drafts import Drafts
from fedsplit.openai.choices import Choice, Piece, Progress
from fedsplit.openai.idle_caches import IdleCaches
from fedsplit.openai.lanes import Lane
from fedsplit.openai.refusals import Refusal
from fedsplit.openai.requests import ChatRequest, Sampling, TextRequest
from fedsplit.openai.sampling import GREEDY, processors
from fedsplit.serve.chat import require_embedded
from fedsplit.serve.template import conversation_text, end_tokens, positions_of

_UNBOUNDED = 4096
"""The most new tokens by default of a model that does not say how many positions it has."""


class Writer:
    """Generates the texts of requests; several threads may use it.

    Args:
        model: The client's model, connected to its trunk.
        tokenizer: The model's tokenizer.
        drafts: The source of drafts for greedy texts; None for no drafts.
        cache_bytes: The most bytes of the caches of requests that were answered.
    """

    def __init__(
        self,
        model: Any,
        tokenizer: PreTrainedTokenizerFast,
        drafts: Drafts | None,
        cache_bytes: int,
    ) -> None:
        self._model = model
        self._idle = IdleCaches(model, cache_bytes)
        self._tokenizer = tokenizer
        self._drafts = drafts
        config = model.generation_config
        self._chat_ends = end_tokens(tokenizer, config, chat=True)
        self._text_ends = end_tokens(tokenizer, config, chat=False)
        # In the main thread: the first call of a tokenizer may change what it was saved with, while
        # no other thread may use it.
        tokenizer("a")

    def write(self, request: Sampling, lane: Lane, emit: Callable[[Piece], None]) -> None:
        """Generate all choices of a request, prompt after prompt.

        Args:
            request: The request.
            lane: The lane of this thread, which ends the generation if it is cancelled.
            emit: Gets each piece at once.

        Raises:
            Cancelled: The lane was cancelled.
            Refusal: The request cannot be served.
            FedsplitError: The trunk refused, or could not be reached.
        """
        first = 0
        for ids_T in self._prompts(request):
            rows = request.n or 1
            choices, limit = range(first, first + rows), self._limit(request, len(ids_T))
            require_embedded(self._model, self._tokenizer, ids_T)
            self._generate(request, ids_T, choices, limit, lane, emit)
            first += rows

    def _generate(
        self,
        request: Sampling,
        ids_T: list[int],
        choices: range,
        limit: int,
        lane: Lane,
        emit: Callable[[Piece], None],
    ) -> None:
        model, tokenizer = self._model, self._tokenizer
        ends = self._chat_ends if isinstance(request, ChatRequest) else self._text_ends
        vocabulary = model.config.get_text_config(decoder=True).vocab_size
        chain, kept = processors(
            request, model.generation_config, prompt=len(ids_T), vocabulary=vocabulary
        )
        ids_BT = torch.tensor([ids_T] * len(choices))
        cache, cached = self._idle.take(ids_BT[0])
        if cached and len(choices) > 1:
            cache.reorder_cache(torch.zeros(len(choices), dtype=torch.int64))
        texts = [
            Choice(
                number,
                tokenizer,
                prompt=len(ids_T),
                cached=cached,
                stops=request.stops,
                ends=ends,
                limit=limit,
                num_logprobs=request.num_logprobs,
            )
            for number in choices
        ]
        try:
            out_BT = model.generate(
                ids_BT.to(model.device),
                attention_mask=torch.ones_like(ids_BT),
                past_key_values=cache,
                # Those of the model's own config would conflict with a cache.
                use_cache=True,
                cache_implementation=None,
                max_new_tokens=limit,
                eos_token_id=list(ends),
                pad_token_id=tokenizer.pad_token_id,
                logits_processor=chain,
                stopping_criteria=StoppingCriteriaList(
                    [Progress(texts, kept, lane, emit, prompt=len(ids_T))]
                ),
                # Processors that draw or keep something must not see tokens that are rejected.
                assistant_model=None if chain or len(texts) > 1 else self._drafts,
                **GREEDY,
            )
        except BaseException:
            self._idle.drop(cache)
            raise
        self._idle.give(cache, out_BT, prompt=len(ids_T))

    def _prompts(self, request: Sampling) -> Iterator[list[int]]:
        """The tokens of each prompt."""
        tokenizer = self._tokenizer
        if isinstance(request, ChatRequest):
            if not tokenizer.chat_template:
                raise Refusal(
                    400,
                    "the tokenizer of this model has no chat template, so it cannot read "
                    "conversations; use /v1/completions, or save the tokenizer with a template",
                    code="no_chat_template",
                    param="messages",
                )
            text = conversation_text(tokenizer, [each.as_turn for each in request.messages])
            # The template writes the special tokens itself.
            yield tokenizer(text, add_special_tokens=False)["input_ids"]
            return
        assert isinstance(request, TextRequest), "there are two kinds"
        for prompt in request.prompts:
            ids = tokenizer(prompt)["input_ids"] if isinstance(prompt, str) else prompt
            if not ids:
                raise Refusal(
                    400,
                    "a prompt is empty; send something for the model to go on from",
                    code="invalid_value",
                    param="prompt",
                )
            yield ids

    def _limit(self, request: Sampling, prompt: int) -> int:
        """The most new tokens after a prompt of this many tokens."""
        positions = positions_of(self._model.config)
        if not positions:
            return request.limit or _UNBOUNDED
        if prompt + max(1, request.limit) > positions:
            param = "messages" if isinstance(request, ChatRequest) else "prompt"
            raise Refusal(
                400,
                f"the model has {positions} positions, but the prompt has {prompt} tokens and "
                f"{max(1, request.limit)} new ones are to follow; shorten the prompt, or ask for "
                "fewer tokens",
                code="context_length_exceeded",
                param=param,
            )
        return request.limit or positions - prompt
