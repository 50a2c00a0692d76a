"""The routes of the server: OpenAI's API, the health of the trunk, and metrics."""

import asyncio
import json
import logging
import secrets
import time
from collections.abc import AsyncIterator, Callable
from typing import Any
from urllib.parse import urlsplit

from fastapi import APIRouter, Depends, FastAPI, Request, Response
from fastapi.responses import JSONResponse, StreamingResponse
from starlette.concurrency import run_in_threadpool
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect

from fedsplit.errors import FedsplitError
from fedsplit.openai.answers import Answer, answer_to
from fedsplit.openai.choices import Piece
from fedsplit.openai.jobs import Job, Jobs
from fedsplit.openai.refusals import Refusal, refusal_of
from fedsplit.openai.requests import ChatRequest, Sampling, TextRequest, read
from fedsplit.wire.messages import ServiceInfoReply

log = logging.getLogger(__name__)

MAX_BODY_BYTES = 4 << 20
"""The longest body of a request."""

_HERE = {"localhost", "127.0.0.1", "::1"}


class Api:
    """The handlers of the routes.

    Args:
        jobs: Begins requests.
        model: The id of the model.
        api_key: The key that callers must present; empty for none.
        trunk_info: Asks the trunk's server for its description.
        metrics: Returns the metrics as text, and its content type.
    """

    def __init__(
        self,
        jobs: Jobs,
        *,
        model: str,
        api_key: str,
        trunk_info: Callable[[], ServiceInfoReply],
        metrics: Callable[[], tuple[bytes, str]],
    ) -> None:
        self._jobs = jobs
        self._model = model
        self._api_key = api_key
        self._trunk_info = trunk_info
        self._metrics = metrics
        self._created = int(time.time())

    def app(self) -> FastAPI:
        """Return the application with all routes."""
        app = FastAPI(
            openapi_url=None,
            exception_handlers={Refusal: _on_refusal, HTTPException: _on_http_error},
        )
        app.add_api_route("/health", self.health, methods=["GET"])
        guarded = APIRouter(dependencies=[Depends(self.admit)])
        for path, handler, method in (
            ("/v1/models", self.models, "GET"),
            ("/v1/models/{model:path}", self.model, "GET"),
            ("/v1/chat/completions", self.chat, "POST"),
            ("/v1/completions", self.text, "POST"),
            ("/metrics", self.metrics, "GET"),
        ):
            guarded.add_api_route(path, handler, methods=[method], response_model=None)
        app.include_router(guarded)
        return app

    async def admit(self, request: Request) -> None:
        """Refuse callers that may not use the server.

        Raises:
            Refusal: The key is missing or wrong, or a web page sends the request.
        """
        if self._api_key:
            given = request.headers.get("authorization", "").removeprefix("Bearer ")
            if not secrets.compare_digest(given.encode(), self._api_key.encode()):
                found = "wrong" if given else "missing"
                raise Refusal(
                    401,
                    f"the API key is {found}; send the key of --api-key-file as "
                    "'Authorization: Bearer KEY'",
                    code="invalid_api_key",
                )
        # Web pages could reach a server without a key through a name of their own for this machine.
        elif (name := _host_of(request)) not in _HERE:
            raise Refusal(
                403,
                f"the request is for the host {name!r}, but a server without an API key answers "
                "for localhost only; start it with --api-key-file",
                code="wrong_host",
            )

    async def models(self) -> dict[str, Any]:
        """List the one model."""
        return {"object": "list", "data": [self._entry]}

    async def model(self, model: str) -> dict[str, Any]:
        """Describe the model."""
        self._check_model(model)
        return self._entry

    async def chat(self, request: Request) -> Response:
        """Answer a conversation."""
        return await self._answered(ChatRequest, request)

    async def text(self, request: Request) -> Response:
        """Continue prompts."""
        return await self._answered(TextRequest, request)

    async def health(self) -> dict[str, Any]:
        """Say whether the trunk can be used.

        Raises:
            Refusal: It does not answer.
        """
        try:
            info = await run_in_threadpool(self._trunk_info)
        except FedsplitError as exc:
            raise refusal_of(exc) from exc
        trunk = {"family": info.family, "version": info.version, "sessions": info.sessions}
        return {"status": "ok", "model": self._model, "trunk": trunk}

    async def metrics(self) -> Response:
        """Return the metrics for Prometheus.

        Raises:
            Refusal: The extra is not installed.
        """
        text, media_type = self._metrics()
        return Response(text, media_type=media_type)

    # --- one request --------------------------------------------------------------------------

    async def _answered(self, kind: type[Sampling], request: Request) -> Response:
        began = time.monotonic()
        try:
            asked = read(kind, await _body_of(request))
            self._check_model(asked.model)
            job = self._jobs.begin(asked)
        except Refusal as refusal:
            self._jobs.report(kind.kind, refusal, time.monotonic() - began)
            raise
        answer, watch = answer_to(asked, self._model), asyncio.create_task(_watch(request, job))
        try:
            pieces = job.pieces()
            if not asked.stream:
                return JSONResponse(answer.whole([piece async for piece in pieces]))
            # A failure before the first piece has a status of its own.
            first = await anext(pieces)
        except Exception as exc:
            raise _refusal_of(exc) from exc
        events = _events(answer, first, pieces, watch)
        return StreamingResponse(events, media_type="text/event-stream")

    def _check_model(self, model: str) -> None:
        if model != self._model:
            raise Refusal(
                404,
                f"the model {model!r} is not served here; this server has {self._model!r}",
                code="model_not_found",
                param="model",
            )

    @property
    def _entry(self) -> dict[str, Any]:
        return {
            "id": self._model,
            "object": "model",
            "created": self._created,
            "owned_by": "fedsplit",
        }


def _host_of(request: Request) -> str | None:
    """The host that a request is for; None if it names none."""
    try:
        return urlsplit(f"//{request.headers.get('host', '')}").hostname
    except ValueError:
        return None


async def _body_of(request: Request) -> bytes:
    """The body of a request.

    Raises:
        Refusal: It is too long, not sent as JSON, or not sent to its end.
    """
    kind = request.headers.get("content-type", "")
    # A page of another site can send a form without asking, but no JSON.
    if kind.partition(";")[0].strip().lower() != "application/json":
        raise Refusal(
            400,
            f"the content type is {kind!r}; send the header 'Content-Type: application/json'",
            code="invalid_content_type",
        )
    body = bytearray()
    try:
        async for part in request.stream():
            body += part
            if len(body) > MAX_BODY_BYTES:
                raise Refusal(
                    413,
                    f"the body is longer than {MAX_BODY_BYTES} bytes; send less",
                    code="request_too_large",
                )
    except ClientDisconnect as exc:
        raise Refusal(400, "the caller is gone", code="disconnected") from exc
    return bytes(body)


async def _watch(request: Request, job: Job) -> None:
    """End a job when its client disconnects, also while no text is written to it."""
    while (await request.receive())["type"] != "http.disconnect":
        pass
    job.cancel()


async def _events(
    answer: Answer, first: Piece, pieces: AsyncIterator[Piece], watch: "asyncio.Task[None]"
) -> AsyncIterator[str]:
    """The answer as server-sent events."""
    try:
        for chunk in answer.chunks(first):
            yield _event(chunk)
        async for piece in pieces:
            for chunk in answer.chunks(piece):
                yield _event(chunk)
        for chunk in answer.last_chunks():
            yield _event(chunk)
        yield "data: [DONE]\n\n"
    except Exception as exc:
        # The status is sent already, so the failure is an event.
        yield _event(_refusal_of(exc).body)


def _event(body: dict[str, Any]) -> str:
    return f"data: {json.dumps(body, ensure_ascii=False, separators=(',', ':'))}\n\n"


def _refusal_of(error: Exception) -> Refusal:
    """The answer that stands for any error; one that is not ours is logged."""
    if isinstance(error, Refusal):
        return error
    if isinstance(error, FedsplitError):
        return refusal_of(error)
    log.error("a request failed", exc_info=error)
    return Refusal(500, "this server failed; its log has the details", code="internal")


async def _on_refusal(request: Request, refusal: Any) -> Response:
    return JSONResponse(refusal.body, refusal.status, headers=refusal.headers)


async def _on_http_error(request: Request, error: Any) -> Response:
    refusal = Refusal(
        error.status_code,
        f"{request.method} {request.url.path}: {error.detail.lower()}; this server has "
        "/v1/chat/completions, /v1/completions, /v1/models, /health and /metrics",
        code="not_found" if error.status_code == 404 else "invalid_request",
    )
    return JSONResponse(refusal.body, refusal.status, headers=error.headers)
