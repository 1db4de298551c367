"""OpenAI answers: whole ones and streamed chunks, encoded straight to bytes."""

from abc import ABC, abstractmethod
from typing import ClassVar

import msgspec

DONE = b"data: [DONE]\n\n"

_encoder = msgspec.json.Encoder()


class CachedTokens(msgspec.Struct):
    cached_tokens: int


class Usage(msgspec.Struct):
    """Tokens of a call: prompts once each, the output of all choices, and the prompt tokens found in a cache."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: CachedTokens


class TextChoice(msgspec.Struct):
    index: int
    text: str
    finish_reason: str | None
    logprobs: None = None


class Message(msgspec.Struct):
    content: str
    role: str = "assistant"
    refusal: None = None


class MessageChoice(msgspec.Struct):
    index: int
    message: Message
    finish_reason: str | None
    logprobs: None = None


class Delta(msgspec.Struct, omit_defaults=True):
    content: str
    role: str | None = None


class DeltaChoice(msgspec.Struct):
    index: int
    delta: Delta
    finish_reason: str | None
    logprobs: None = None


Choice = TextChoice | MessageChoice | DeltaChoice
OptionalUsage = Usage | None | msgspec.UnsetType
"""UNSET leaves the field out; null is what a chunk says when the usage comes in the last one."""


class Body(msgspec.Struct):
    id: str
    object: str
    created: int
    model: str
    choices: list[Choice]
    usage: OptionalUsage


class Reply(ABC):
    """The answer to one HTTP call. `created_s` is Unix time."""

    id_prefix: ClassVar[str]
    whole_object: ClassVar[str]
    chunk_object: ClassVar[str]

    def __init__(self, reply_id: str, created_s: int, model_name: str) -> None:
        self._id = self.id_prefix + reply_id
        self._created_s = created_s
        self._model_name = model_name

    def chunk(self, index: int, text: str, finish: str | None, usage: OptionalUsage) -> bytes:
        """The server-sent event for one token of choice `index`."""
        return self._event([self._chunk_choice(index, text, finish)], usage)

    def usage_chunk(self, usage: Usage) -> bytes:
        return self._event([], usage)

    def whole(self, texts: list[str], finishes: list[str | None], usage: Usage) -> bytes:
        """The JSON of an answer that is not streamed; one text and finish reason for each choice."""
        choices = [self._whole_choice(i, *parts) for i, parts in enumerate(zip(texts, finishes, strict=True))]
        return self._encode(self.whole_object, choices, usage)

    @abstractmethod
    def _chunk_choice(self, index: int, text: str, finish: str | None) -> Choice: ...

    @abstractmethod
    def _whole_choice(self, index: int, text: str, finish: str | None) -> Choice: ...

    def _event(self, choices: list[Choice], usage: OptionalUsage) -> bytes:
        return b"data: " + self._encode(self.chunk_object, choices, usage) + b"\n\n"

    def _encode(self, kind: str, choices: list[Choice], usage: OptionalUsage) -> bytes:
        return _encoder.encode(Body(self._id, kind, self._created_s, self._model_name, choices, usage))


class CompletionReply(Reply):
    """The answer to a call of /v1/completions."""

    id_prefix = "cmpl-"
    whole_object = chunk_object = "text_completion"

    def _chunk_choice(self, index: int, text: str, finish: str | None) -> Choice:
        return TextChoice(index, text, finish)

    _whole_choice = _chunk_choice


class ChatReply(Reply):
    """The answer to a call of /v1/chat/completions.

    The role comes with the first token: in a chunk of its own it would look like a token to whoever counts chunks.
    """

    id_prefix = "chatcmpl-"
    whole_object = "chat.completion"
    chunk_object = "chat.completion.chunk"

    def __init__(self, reply_id: str, created_s: int, model_name: str) -> None:
        super().__init__(reply_id, created_s, model_name)
        self._begun: set[int] = set()

    def _chunk_choice(self, index: int, text: str, finish: str | None) -> Choice:
        role = None if index in self._begun else "assistant"
        self._begun.add(index)
        return DeltaChoice(index, Delta(text, role), finish)

    def _whole_choice(self, index: int, text: str, finish: str | None) -> Choice:
        return MessageChoice(index, Message(text), finish)
