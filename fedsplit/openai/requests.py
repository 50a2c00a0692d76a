"""The bodies of requests: their fields and ranges, and what is refused.

Fields that the API does not know are ignored, as OpenAI's servers do. Fields that change the form
of an answer in a way that this server cannot are refused, except with a value without effect.
"""

import json
from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from fedsplit.openai.refusals import Refusal

_STOPS = 4
"""The most stop strings of a request, as at OpenAI."""

Stop = Annotated[str, Field(min_length=1)]
Bias = Annotated[float, Field(ge=-100, le=100)]
Penalty = Annotated[float, Field(ge=-2, le=2)]
Count = Annotated[int, Field(ge=1)]
Token = Annotated[int, Field(ge=0)]


class _Fields(BaseModel):
    """Fields of JSON, without conversions of types; a field that is null has its default."""

    model_config = ConfigDict(extra="ignore", frozen=True, strict=True)


class StreamOptions(_Fields):
    """The options of an answer in pieces."""

    include_usage: bool = False


class Sampling(_Fields):
    """The fields that both kinds of requests have; each is described in OpenAI's reference.

    Attributes:
        kind: The name of this kind of requests, in metrics.
        refused: The fields that are refused, each with its values that have no effect.
    """

    kind: ClassVar[str]
    refused: ClassVar[Mapping[str, tuple[Any, ...]]] = {}

    model: str
    max_tokens: Count | None = None
    temperature: Annotated[float, Field(ge=0, le=2)] | None = None
    top_p: Annotated[float, Field(ge=0, le=1)] | None = None
    n: Annotated[int, Field(ge=1, le=128)] | None = None
    stop: Stop | Annotated[list[Stop], Field(max_length=_STOPS)] | None = None
    seed: int | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    presence_penalty: Penalty | None = None
    frequency_penalty: Penalty | None = None
    logit_bias: dict[str, Bias] | None = None

    @property
    def stops(self) -> tuple[str, ...]:
        """The strings that end a text."""
        return (self.stop,) if isinstance(self.stop, str) else tuple(self.stop or ())

    @property
    def num_logprobs(self) -> int:
        """How many alternatives each token is answered with; -1 without probabilities."""
        raise NotImplementedError

    @property
    def limit(self) -> int:
        """The most new tokens; 0 for as many as the model has positions for."""
        raise NotImplementedError

    @property
    def includes_usage(self) -> bool:
        """Whether an answer in pieces ends with its numbers of tokens."""
        return bool(self.stream_options and self.stream_options.include_usage)


class TextPart(_Fields):
    """A part of a message; only text is read."""

    type: Literal["text"]
    text: str


class Message(_Fields):
    """A turn of a conversation."""

    role: str
    content: str | list[TextPart]

    @property
    def as_turn(self) -> dict[str, Any]:
        """The turn for a chat template, in which a developer is called system."""
        content = self.content
        text = content if isinstance(content, str) else "".join(part.text for part in content)
        return {"role": "system" if self.role == "developer" else self.role, "content": text}


class ChatRequest(Sampling):
    """The body of `POST /v1/chat/completions`."""

    kind = "chat_completion"
    refused = {
        "tools": ([],),
        "tool_choice": ("none", "auto"),
        "functions": ([],),
        "function_call": ("none", "auto"),
        "response_format": ({"type": "text"},),
        "modalities": (["text"],),
        "audio": (),
        "prediction": (),
        "web_search_options": (),
    }

    messages: Annotated[list[Message], Field(min_length=1)]
    max_completion_tokens: Count | None = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=20)] | None = None

    @property
    def num_logprobs(self) -> int:
        """See `Sampling`."""
        return (self.top_logprobs or 0) if self.logprobs else -1

    @property
    def limit(self) -> int:
        """See `Sampling`."""
        return self.max_completion_tokens or self.max_tokens or 0


class TextRequest(Sampling):
    """The body of `POST /v1/completions`."""

    kind = "completion"
    refused = {"suffix": ("",), "echo": (False,), "best_of": (1,)}
    default_limit: ClassVar[int] = 16  # that of OpenAI

    prompt: str | list[str] | list[Token] | list[list[Token]]
    logprobs: Annotated[int, Field(ge=0, le=5)] | None = None

    @property
    def num_logprobs(self) -> int:
        """See `Sampling`."""
        return -1 if self.logprobs is None else self.logprobs

    @property
    def limit(self) -> int:
        """See `Sampling`."""
        return self.max_tokens or self.default_limit

    @property
    def prompts(self) -> list[str | list[int]]:
        """The prompts, each as text or as tokens."""
        prompt: Any = self.prompt
        several = isinstance(prompt, list) and prompt and not isinstance(prompt[0], int)
        return prompt if several else [prompt]


S = TypeVar("S", bound=Sampling)


def read(kind: type[S], body: bytes) -> S:
    """Return the request of a body.

    Raises:
        Refusal: It is no JSON object, or a field is missing, out of its range, or not supported.
    """
    try:
        fields = json.loads(body)
        # JSON can spell halves of characters, which no tokenizer reads.
        json.dumps(fields, ensure_ascii=False).encode()
    except (ValueError, RecursionError) as exc:
        text = f"the body is not JSON in UTF-8 ({type(exc).__name__})"
        raise Refusal(400, text, code="invalid_json") from exc
    if not isinstance(fields, dict):
        raise Refusal(
            400, f"the body is a {type(fields).__name__}; send a JSON object", code="invalid_json"
        )
    for name, harmless in kind.refused.items():
        value = fields.get(name)
        if value is not None and value not in harmless:
            raise Refusal(
                400,
                f"{name} is not supported by this server; leave it out",
                code="unsupported_parameter",
                param=name,
            )
    try:
        return kind.model_validate(fields)
    except ValidationError as exc:
        raise _refusal(exc, fields) from exc


def _refusal(error: ValidationError, fields: Mapping[str, Any]) -> Refusal:
    """The answer to a field that cannot be read; of several, the most exact place is named."""
    places = [(_place(each["loc"], fields), each) for each in error.errors()]
    place, found = max(places, key=lambda each: len(each[0]))
    sent = f" ({_short(found['input'])} was sent)"
    if found["type"] == "missing":
        place, sent = (*place, found["loc"][-1]), ""
    name = "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in place)[1:]
    return Refusal(400, f"{name}: {found['msg']}{sent}", code="invalid_value", param=name)


def _place(path: tuple[int | str, ...], fields: Any) -> tuple[int | str, ...]:
    """A path of pydantic within the fields, without the names that it has for types of a union."""
    place: list[int | str] = []
    at = fields
    for part in path:
        is_key = isinstance(at, dict) and part in at
        if is_key or (isinstance(at, list) and isinstance(part, int)):
            place.append(part)
            at = at[part]
    return tuple(place)


def _short(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 80 else f"{text[:76]} ..."
