"""The HTTP server: OpenAI's endpoints over an engine client, one ASGI app in a process of its own."""

import asyncio
import importlib.metadata
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING

import jinja2
import msgspec
import uvicorn
from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import Response
from prometheus_client import CONTENT_TYPE_LATEST
from starlette.exceptions import HTTPException
from starlette.types import Receive, Scope, Send
from tokenizers import Tokenizer

from engine.engine_client import ClientGone, EngineClient, Generation, GenerationFailed
from engine.metrics import Metrics
from engine.openai_api import (
    ApiError,
    Call,
    ChatRequest,
    CompletionRequest,
    GenerationRequest,
    ServedModel,
    check_supported,
    invalid_body,
    plan_call,
)
from engine.openai_replies import DONE, CachedTokens, ChatReply, CompletionReply, OptionalUsage, Reply, Usage
from engine.request import FinishReason, TokenOutput
from engine.tokenizer import OutputText

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

LONG_TEXT_CHARACTERS = 4096  # longer ones are tokenised in a thread, so that streams go on
EVENT_STREAM_HEADERS = [
    (b"content-type", b"text/event-stream; charset=utf-8"),
    (b"cache-control", b"no-cache"),
    (b"x-accel-buffering", b"no"),  # asks nginx not to collect the tokens
]


class Answer(Response):
    """Generates and sends the answer to one call; aborts it in the engine as soon as its client is gone.

    The status line waits for the first token, so that an engine that fails before it is a plain 500.
    """

    def __init__(self, client: EngineClient, tokenizer: Tokenizer, call: Call, reply: Reply) -> None:
        super().__init__()
        self._client = client
        self._call = call
        self._reply = reply
        self._texts = [OutputText(tokenizer, prompt_ids, call.stops) for prompt_ids, _ in call.choices]
        self._finishes: list[str | None] = [None] * len(call.choices)
        self._output_tokens = 0
        self._cached_tokens = [0] * len(call.choices)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            generation = self._client.submit(self._call.choices)
        except GenerationFailed as error:
            await error_response(_engine_error(error))(scope, receive, send)
            return
        watcher = asyncio.create_task(_close_when_gone(receive, generation))
        try:
            if self._call.stream:
                await self._stream(generation, scope, receive, send)
            else:
                await self._collect(generation, scope, receive, send)
        except ClientGone:
            pass
        finally:
            watcher.cancel()
            generation.close()

    async def _stream(self, generation: Generation, scope: Scope, receive: Receive, send: Send) -> None:
        started = False
        try:
            async for batch in generation:
                chunks = b"".join([self._chunk(generation, *item) for item in batch])
                if not started:
                    await send({"type": "http.response.start", "status": 200, "headers": EVENT_STREAM_HEADERS})
                    started = True
                await send({"type": "http.response.body", "body": chunks, "more_body": True})
            last = self._reply.usage_chunk(self._usage()) if self._call.include_usage else b""
        except GenerationFailed as error:
            if not started:
                await error_response(_engine_error(error))(scope, receive, send)
                return
            last = b"data: " + _engine_error(error).body + b"\n\n"
        await send({"type": "http.response.body", "body": last + DONE, "more_body": False})

    async def _collect(self, generation: Generation, scope: Scope, receive: Receive, send: Send) -> None:
        texts: list[list[str]] = [[] for _ in self._texts]
        try:
            async for batch in generation:
                for number, output in batch:
                    if self._finishes[number] is None:
                        texts[number].append(self._take(generation, number, output))
        except GenerationFailed as error:
            response = error_response(_engine_error(error))
        else:
            body = self._reply.whole(["".join(pieces) for pieces in texts], self._finishes, self._usage())
            response = Response(body, media_type="application/json")
        await response(scope, receive, send)

    def _chunk(self, generation: Generation, number: int, output: TokenOutput) -> bytes:
        if self._finishes[number] is not None:
            return b""  # came between the stop string and the abort
        text = self._take(generation, number, output)
        usage: OptionalUsage = msgspec.UNSET
        if self._call.include_usage:
            usage = self._usage() if self._call.continuous_usage else None
        return self._reply.chunk(number, text, self._finishes[number], usage)

    def _take(self, generation: Generation, number: int, output: TokenOutput) -> str:
        """Count one token of a choice that goes on; returns the text that it makes certain."""
        self._output_tokens += 1
        if output.cached_tokens:
            self._cached_tokens[number] = output.cached_tokens
        text = self._texts[number]
        # A token that ended the output as a stop token is no part of the text.
        piece = "" if output.finish_reason is FinishReason.STOP else text.push(output.token_id)
        if output.finish_reason is not None:
            piece += text.flush()
            self._finishes[number] = output.finish_reason.value
        if text.stopped:
            self._finishes[number] = FinishReason.STOP.value
            generation.stop(number)
        return piece

    def _usage(self) -> Usage:
        prompt, output = self._call.prompt_tokens, self._output_tokens
        return Usage(prompt, output, prompt + output, CachedTokens(sum(self._cached_tokens)))


async def _close_when_gone(receive: Receive, generation: Generation) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass
    generation.close()


def _engine_error(error: GenerationFailed) -> ApiError:
    return ApiError(str(error), code="engine_failed", status=500, kind="server_error")


def error_response(error: ApiError) -> Response:
    """The error in OpenAI's shape."""
    return Response(error.body, error.status, media_type="application/json")


class OpenAIService:
    """What the endpoints share. `wall_clock` gives Unix seconds, `new_id` an id that it never gives again."""

    def __init__(
        self,
        client: EngineClient,
        tokenizer: "PreTrainedTokenizerFast",
        model: ServedModel,
        wall_clock: Callable[[], float],
        new_id: Callable[[], str],
    ) -> None:
        self.client = client
        self.model = model
        self._tokenizer = tokenizer
        self._wall_clock = wall_clock
        self._new_id = new_id

    async def complete(self, request: CompletionRequest) -> Response:
        check_supported(request, self.model)
        prompts = [await self._token_ids(prompt, special=True) for prompt in request.prompts()]
        return self._answer(request, prompts, CompletionReply)

    async def chat(self, request: ChatRequest) -> Response:
        check_supported(request, self.model)
        messages = [{"role": message.role, "content": message.text} for message in request.messages]
        try:
            text = self._tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        except (ValueError, jinja2.TemplateError) as error:
            raise ApiError(f"the model's chat template refuses these messages: {error}", "messages") from error
        assert isinstance(text, str), "one conversation gives one text"
        # The template writes the special tokens itself.
        return self._answer(request, [await self._token_ids(text, special=False)], ChatReply)

    async def _token_ids(self, prompt: str | list[int], special: bool) -> list[int]:
        if not isinstance(prompt, str):
            return prompt
        backend = self._tokenizer.backend_tokenizer
        if len(prompt) <= LONG_TEXT_CHARACTERS:
            return backend.encode(prompt, add_special_tokens=special).ids
        encoding = await asyncio.to_thread(backend.encode, prompt, add_special_tokens=special)
        return encoding.ids

    def _answer(self, request: GenerationRequest, prompts: Sequence[list[int]], reply_type: type[Reply]) -> Response:
        call = plan_call(request, prompts, self.model)
        reply = reply_type(self._new_id(), int(self._wall_clock()), self.model.name)
        return Answer(self.client, self._tokenizer.backend_tokenizer, call, reply)

    def model_card(self) -> dict[str, object]:
        return {
            "id": self.model.name,
            "object": "model",
            "created": self.model.created_s,
            "owned_by": "pacer",
            "root": self.model.name,
            "parent": None,
            "max_model_len": self.model.max_model_tokens,
        }


def build_app(
    client: EngineClient,
    tokenizer: "PreTrainedTokenizerFast",
    model: ServedModel,
    metrics: Metrics,
    wall_clock: Callable[[], float],
    new_id: Callable[[], str],
) -> FastAPI:
    """The ASGI app; it starts and stops the client. `wall_clock` gives Unix seconds, `new_id` fresh ids."""

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        client.start()
        yield
        await client.stop()

    app = FastAPI(title="Pacer", version=importlib.metadata.version("pacer"), lifespan=lifespan)
    service = OpenAIService(client, tokenizer, model, wall_clock, new_id)
    app.post("/v1/completions")(service.complete)
    app.post("/v1/chat/completions")(service.chat)
    _add_information(app, service, metrics)
    _add_error_handlers(app)
    return app


def _add_information(app: FastAPI, service: OpenAIService, metrics: Metrics) -> None:
    @app.get("/v1/models")
    async def models() -> dict[str, object]:
        return {"object": "list", "data": [service.model_card()]}

    @app.get("/v1/models/{name:path}")
    async def model(name: str) -> dict[str, object]:
        if name != service.model.name:
            raise ApiError(f"the model {name!r} does not exist", "model", "model_not_found", status=404)
        return service.model_card()

    @app.api_route("/ping", methods=["GET", "POST"], include_in_schema=False)
    @app.get("/health")
    async def health() -> Response:
        if service.client.failure is not None:
            raise ApiError(service.client.failure, code="engine_failed", status=503, kind="server_error")
        return Response()

    @app.get("/metrics")
    async def metrics_page() -> Response:
        return Response(metrics.render(), headers={"content-type": CONTENT_TYPE_LATEST})

    @app.get("/version")
    async def version() -> dict[str, str]:
        return {"version": app.version}


def _add_error_handlers(app: FastAPI) -> None:
    @app.exception_handler(ApiError)
    async def on_api_error(_: Request, error: ApiError) -> Response:
        return error_response(error)

    @app.exception_handler(RequestValidationError)
    async def on_invalid_body(_: Request, error: RequestValidationError) -> Response:
        return error_response(invalid_body(error.errors()))

    @app.exception_handler(HTTPException)
    async def on_http_error(_: Request, error: HTTPException) -> Response:
        response = error_response(ApiError(str(error.detail), status=error.status_code))
        response.headers.update(error.headers or {})
        return response

    @app.exception_handler(Exception)
    async def on_defect(_: Request, error: Exception) -> Response:
        # uvicorn logs the traceback; the client learns no inner details.
        return error_response(ApiError("internal server error", status=500, kind="server_error"))


def http_server(app: FastAPI, host: str, port: int) -> uvicorn.Server:
    """A uvicorn server for the app; await its `serve()`. Port 0 takes a free one."""
    config = uvicorn.Config(
        app, host=host, port=port, ws="none", access_log=False, log_level="warning", timeout_graceful_shutdown=5
    )
    return uvicorn.Server(config)
