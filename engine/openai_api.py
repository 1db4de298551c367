"""OpenAI requests: what is accepted, what is refused and how, and what the engine is asked to do."""

import json
import reprlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Literal, cast

from pydantic import AfterValidator, BaseModel, ConfigDict, Field

from engine.request import SamplingParams

DEFAULT_COMPLETION_TOKENS = 16  # OpenAI's, for /v1/completions
MAX_CHOICES = 256  # prompts times n in one call
SEEDS = 2**63

# Parameters that no token depends on.
IGNORED = frozenset(
    ("metadata", "parallel_tool_calls", "prompt_cache_key", "request_id", "safety_identifier", "service_tier", "store")
)
# Parameters that we do not have, with the value at which their absence makes no difference (so does null).
NEUTRAL: Mapping[str, object] = {
    "add_generation_prompt": True,
    "add_special_tokens": True,
    "bad_words": [],
    "best_of": 1,
    "continue_final_message": False,
    "echo": False,
    "frequency_penalty": 0,
    "include_stop_str_in_output": False,
    "length_penalty": 1,
    "logit_bias": {},
    "logprobs": False,
    "min_p": 0,
    "min_tokens": 0,
    "modalities": ["text"],
    "presence_penalty": 0,
    "priority": 0,
    "repetition_penalty": 1,
    "response_format": {"type": "text"},
    "skip_special_tokens": True,
    "spaces_between_special_tokens": True,
    "suffix": "",
    "tool_choice": "none",
    "tools": [],
    "top_logprobs": 0,
    "use_beam_search": False,
}


class ApiError(Exception):
    """An answer other than 200, in OpenAI's shape."""

    def __init__(
        self,
        message: str,
        param: str | None = None,
        code: str | None = None,
        status: int = 400,
        kind: str = "invalid_request_error",
    ) -> None:
        super().__init__(message)
        self.status = status
        self.error = {"message": message, "type": kind, "param": param, "code": code}

    @property
    def body(self) -> bytes:
        # The escapes of plain json keep even lone surrogates, which a message may quote, encodable.
        return json.dumps({"error": self.error}).encode()


@dataclass(frozen=True, slots=True)
class ServedModel:
    """What requests are checked against.

    `vocabulary` is the number of token ids; prompt and output together have at most `max_model_tokens`. Output ends at
    one of `eos_token_ids` unless a request ignores them. `created_s` is Unix time.
    """

    name: str
    max_model_tokens: int
    vocabulary: int
    eos_token_ids: tuple[int, ...]
    created_s: int


def _unicode(text: str) -> str:
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise ValueError(f"not valid Unicode ({error.reason} at character {error.start})") from error
    return text


Text = Annotated[str, AfterValidator(_unicode)]  # JSON escapes can write half a surrogate pair; no tokenizer takes it
Texts = Annotated[list[Text], Field(fail_fast=True)]
TokenIds = Annotated[list[Annotated[int, Field(ge=0)]], Field(fail_fast=True)]
StopString = Annotated[str, Field(min_length=1, max_length=1000)]


class StreamOptions(BaseModel):
    model_config = ConfigDict(strict=True)

    include_usage: bool | None = None
    continuous_usage_stats: bool | None = None


class GenerationRequest(BaseModel):
    """The parameters that both endpoints share; what they do not name is in `model_extra`."""

    model_config = ConfigDict(extra="allow", strict=True, allow_inf_nan=False)

    model: str | None = None
    max_tokens: int | None = Field(None, ge=1)
    max_completion_tokens: int | None = Field(None, ge=1)
    temperature: float | None = Field(None, ge=0, le=2)
    top_p: float | None = Field(None, gt=0, le=1)
    top_k: int | None = Field(None, ge=-1, description="-1 and 0 keep all tokens")
    seed: int | None = Field(None, ge=0, lt=SEEDS)
    n: int | None = Field(None, ge=1, le=8)
    stop: StopString | Annotated[list[StopString], Field(max_length=16)] | None = None
    stop_token_ids: Annotated[TokenIds, Field(max_length=64)] | None = None
    ignore_eos: bool | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    user: str | None = None

    @property
    def stops(self) -> list[str]:
        return [self.stop] if isinstance(self.stop, str) else self.stop or []


class CompletionRequest(GenerationRequest):
    prompt: Text | Texts | TokenIds | Annotated[list[TokenIds], Field(fail_fast=True)]

    def prompts(self) -> Sequence[str | list[int]]:
        """Each prompt, as text or as token ids."""
        if isinstance(self.prompt, str):
            return [self.prompt]
        if self.prompt and isinstance(self.prompt[0], int):
            return [self.prompt]
        return cast("list[str] | list[list[int]]", self.prompt)


class TextPart(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)

    type: Literal["text"]
    text: Text


class ChatMessage(BaseModel):
    model_config = ConfigDict(extra="allow", strict=True)

    role: Text
    content: Text | list[TextPart]
    name: str | None = None

    @property
    def text(self) -> str:
        return self.content if isinstance(self.content, str) else "\n".join(part.text for part in self.content)


class ChatRequest(GenerationRequest):
    messages: list[ChatMessage] = Field(min_length=1)


def check_supported(request: GenerationRequest, model: ServedModel) -> None:
    """Raises ApiError for another model, and for a parameter that is unknown or unsupported at its value."""
    if request.model not in (None, model.name):
        message = f"the model {request.model!r} does not exist: this server serves {model.name!r}"
        raise ApiError(message, "model", "model_not_found")
    for name, value in (request.model_extra or {}).items():
        if value is None or name in IGNORED:
            continue
        if name not in NEUTRAL:
            raise ApiError(f"unknown parameter {name!r}: leave it out", name, "unknown_parameter")
        if not _same(value, NEUTRAL[name]):
            message = f"{name} is not supported: leave it out, or set it to {json.dumps(NEUTRAL[name])}"
            raise ApiError(message, name, "unsupported_parameter")
    if request.stream_options is not None and not request.stream:
        raise ApiError("stream_options needs stream to be true", "stream_options")
    if isinstance(request, ChatRequest):
        for number, chat_message in enumerate(request.messages):
            for name, value in (chat_message.model_extra or {}).items():
                if value:
                    message = f"messages[{number}].{name} is not supported: leave it out"
                    raise ApiError(message, "messages", "unsupported_parameter")


def _same(value: object, neutral: object) -> bool:
    """Equal as JSON is: false is not 0, but 1 is 1.0."""
    return isinstance(value, bool) == isinstance(neutral, bool) and value == neutral


@dataclass(frozen=True, slots=True)
class Call:
    """One HTTP call as the engine sees it: for each choice of the answer a prompt and how to continue it."""

    choices: list[tuple[list[int], SamplingParams]]
    prompt_tokens: int  # each prompt once, however many choices it has
    stops: list[str]
    stream: bool
    include_usage: bool
    continuous_usage: bool


def plan_call(request: GenerationRequest, prompts: Sequence[list[int]], model: ServedModel) -> Call:
    """The engine requests of a call whose prompts are tokenised. Choice i * n + j is continuation j of prompt i.

    Raises ApiError for prompts and parameters that the model cannot serve.
    """
    n = request.n or 1
    param = "messages" if isinstance(request, ChatRequest) else "prompt"
    if not prompts:
        raise ApiError("prompt is an empty list: give at least one prompt", param)
    if len(prompts) * n > MAX_CHOICES:
        raise ApiError(f"{len(prompts)} prompts with n {n} are more than {MAX_CHOICES} choices: send fewer", param)
    _check_ids(request.stop_token_ids or (), "stop_token_ids", model)
    choices = []
    for prompt_ids in prompts:
        if not prompt_ids:
            raise ApiError("the prompt is empty: give at least one token", param)
        _check_ids(prompt_ids, param, model)
        max_tokens = _output_tokens(request, len(prompt_ids), param, model)
        choices += [(prompt_ids, _sampling(request, max_tokens, number, model)) for number in range(n)]
    options = request.stream_options or StreamOptions()
    return Call(
        choices=choices,
        prompt_tokens=sum(map(len, prompts)),
        stops=request.stops,
        stream=bool(request.stream),
        include_usage=bool(options.include_usage),
        continuous_usage=bool(options.include_usage and options.continuous_usage_stats),
    )


def _check_ids(token_ids: Sequence[int], param: str, model: ServedModel) -> None:
    largest = max(token_ids, default=0)
    if largest >= model.vocabulary:
        message = f"token id {largest} is outside the vocabulary: ids are 0 to {model.vocabulary - 1}"
        raise ApiError(message, param, "invalid_token_id")


def _output_tokens(request: GenerationRequest, prompt_tokens: int, param: str, model: ServedModel) -> int:
    """How many tokens to generate; with no limit given, what fits."""
    asked = request.max_completion_tokens or request.max_tokens
    left = model.max_model_tokens - prompt_tokens
    if left < (asked or 1):
        message = (
            f"this model's maximum context length is {model.max_model_tokens} tokens, but the prompt has "
            f"{prompt_tokens} and the output at least {asked or 1}: shorten the prompt"
            + (" or lower max_tokens" if asked else "")
        )
        raise ApiError(message, param, "context_length_exceeded")
    if asked is None:
        return left if isinstance(request, ChatRequest) else min(DEFAULT_COMPLETION_TOKENS, left)
    return asked


def _sampling(request: GenerationRequest, max_tokens: int, number: int, model: ServedModel) -> SamplingParams:
    """`number` counts the continuations of one prompt: each has its own seed, the first the given one."""
    eos = () if request.ignore_eos else model.eos_token_ids
    return SamplingParams(
        max_tokens=max_tokens,
        temperature=1.0 if request.temperature is None else request.temperature,
        top_p=1.0 if request.top_p is None else request.top_p,
        top_k=min(max(0, request.top_k or 0), model.vocabulary),
        seed=None if request.seed is None else (request.seed + number) % SEEDS,
        stop_token_ids=tuple(dict.fromkeys((*eos, *(request.stop_token_ids or ())))),
    )


def invalid_body(errors: Sequence[Mapping[str, Any]]) -> ApiError:
    """What pydantic found wrong with a body, as one error about the first parameter concerned."""
    first = errors[0]
    if first["type"] == "json_invalid":
        return ApiError(f"the body is not valid JSON: {first['ctx']['error']} (character {first['loc'][-1]})")
    if len(first["loc"]) < 2:
        return ApiError(f"{first['msg']}: send a JSON object, with content-type application/json")
    param = str(first["loc"][1])
    found = dict.fromkeys(_complaint(error) for error in errors if error["loc"][1] == param)
    return ApiError("; or ".join(list(found)[:4]), param)


def _complaint(error: Mapping[str, Any]) -> str:
    """As `prompt[0]: what should be, not what is`. Pydantic's names for the branches of a union are left out."""
    _, param, *rest = error["loc"]
    path = "".join(
        f"[{part}]" if isinstance(part, int) else f".{part}"
        for part in rest
        if isinstance(part, int) or part.isidentifier()
    )
    found = "" if error["type"] == "missing" else f", not {reprlib.repr(error['input'])}"
    return f"{param}{path}: {error['msg']}{found}"
