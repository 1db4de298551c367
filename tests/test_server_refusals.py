"""What the server refuses, and that it says so in OpenAI's shape."""

import json
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import openai
import pytest
from served_wire import TIMEOUT_S, Server, WireEnd, call, client_fixture, engine_fixture, pool_fixture, server_fixture  # noqa: F401 (pytest finds fixtures by import)

from engine.request import Submit

COMPLETION = {"prompt": "p"}
CHAT = {"messages": [{"role": "user", "content": "q"}]}
IMAGE = [{"type": "image_url", "image_url": {"url": "x"}}]


@pytest.mark.parametrize(
    ("change", "param", "code"),
    [
        ({"model": "other"}, "model", "model_not_found"),
        ({"max_tokens": -1}, "max_tokens", None),
        ({"max_tokens": 0}, "max_tokens", None),
        ({"max_tokens": "5"}, "max_tokens", None),
        ({"temperature": -0.1}, "temperature", None),
        ({"temperature": 2.1}, "temperature", None),
        ({"temperature": float("nan")}, "temperature", None),
        ({"top_p": 0}, "top_p", None),
        ({"top_k": -2}, "top_k", None),
        ({"seed": -1}, "seed", None),
        ({"seed": 2**63}, "seed", None),
        ({"n": 9}, "n", None),
        ({"stop": ""}, "stop", None),
        ({"stop": ["x"] * 17}, "stop", None),
        ({"stop_token_ids": [260]}, "stop_token_ids", "invalid_token_id"),
        ({"prompt": ""}, "prompt", None),
        ({"prompt": []}, "prompt", None),
        ({"prompt": [[]]}, "prompt", None),
        ({"prompt": ["ok", ""]}, "prompt", None),
        ({"prompt": [1, 260]}, "prompt", "invalid_token_id"),
        ({"prompt": [-1]}, "prompt", None),
        ({"prompt": [10**30]}, "prompt", "invalid_token_id"),
        ({"prompt": 5}, "prompt", None),
        ({"prompt": None}, "prompt", None),
        ({"prompt": ["a", 1]}, "prompt", None),
        ({"prompt": "\ud800"}, "prompt", None),
        ({"prompt": ["p"] * 100, "n": 3}, "prompt", None),
        ({"prompt": [7] * 60_000}, "prompt", "context_length_exceeded"),
        ({"prompt": [7] * 59_990, "max_tokens": 11}, "prompt", "context_length_exceeded"),
        ({"prompt": "long " * 20_000}, "prompt", "context_length_exceeded"),
        ({"max_tokens": 10**30}, "prompt", "context_length_exceeded"),
        ({"stream_options": {"include_usage": True}}, "stream_options", None),
        ({"logprobs": 0}, "logprobs", "unsupported_parameter"),
        ({"echo": True}, "echo", "unsupported_parameter"),
        ({"best_of": 2}, "best_of", "unsupported_parameter"),
        ({"suffix": "s"}, "suffix", "unsupported_parameter"),
        ({"logit_bias": {"5": 1}}, "logit_bias", "unsupported_parameter"),
        ({"presence_penalty": 0.5}, "presence_penalty", "unsupported_parameter"),
        ({"frequency_penalty": -1}, "frequency_penalty", "unsupported_parameter"),
        ({"max_token": 5}, "max_token", "unknown_parameter"),
    ],
)
def test_a_bad_completion_is_a_400_that_names_the_parameter(
    server: Server, change: dict[str, Any], param: str, code: str | None
) -> None:
    status, answer = server.post("/v1/completions", json.dumps(COMPLETION | change).encode())
    assert (status, answer["error"]["param"], answer["error"]["code"]) == (400, param, code), answer
    assert answer["error"]["type"] == "invalid_request_error"
    assert answer["error"]["message"]


@pytest.mark.parametrize(
    ("change", "param", "code"),
    [
        ({"messages": []}, "messages", None),
        ({"messages": [{"role": "user"}]}, "messages", None),
        ({"messages": [{"role": "user", "content": IMAGE}]}, "messages", None),
        ({"messages": [{"role": "tool", "content": "x"}]}, "messages", None),
        ({"messages": [{"role": "\ud800", "content": "x"}]}, "messages", None),
        ({"messages": [{"role": "user", "content": "\ud800"}]}, "messages", None),
        ({"messages": [{"role": "assistant", "content": "", "tool_calls": [{}]}]}, "messages", "unsupported_parameter"),
        ({"messages": [{"role": "user", "content": "x" * 60_000}]}, "messages", "context_length_exceeded"),
        ({"max_completion_tokens": 59_997}, "messages", "context_length_exceeded"),
        ({"tools": [{"type": "function"}]}, "tools", "unsupported_parameter"),
        ({"response_format": {"type": "json_object"}}, "response_format", "unsupported_parameter"),
        ({"logprobs": True}, "logprobs", "unsupported_parameter"),
    ],
)
def test_a_bad_chat_is_a_400_that_names_the_parameter(
    server: Server, change: dict[str, Any], param: str, code: str | None
) -> None:
    status, answer = server.post("/v1/chat/completions", json.dumps(CHAT | change).encode())
    assert (status, answer["error"]["param"], answer["error"]["code"]) == (400, param, code), answer


@pytest.mark.parametrize(
    ("body", "content_type"),
    [
        (b'{"prompt": "p"', "application/json"),
        (b"", "application/json"),
        (b"[1]", "application/json"),
        (b"\xff\xfe", "application/json"),
        (b"[" * 100_000, "application/json"),
        (b'{"prompt": "p", "\\ud800": 1}', "application/json"),
        (b'{"prompt": "p"}', "text/plain"),
    ],
)
def test_a_body_that_is_no_json_object_is_a_400(server: Server, body: bytes, content_type: str) -> None:
    status, answer = server.post("/v1/completions", body, content_type)
    assert (status, answer["error"]["type"]) == (400, "invalid_request_error"), answer


def test_a_refusal_names_the_place_and_the_value(server: Server) -> None:
    _, answer = server.post("/v1/completions", b'{"prompt": [5, -7]}')
    assert "prompt[1]: Input should be greater than or equal to 0, not -7" in answer["error"]["message"]
    _, answer = server.post(
        "/v1/completions", b'{"prompt": "p", "stream": true, "stream_options": {"include_usage": 3}}'
    )
    assert answer["error"]["message"].startswith("stream_options.include_usage: ")


def test_the_official_client_raises_its_own_error_for_a_refusal(client: openai.OpenAI) -> None:
    with pytest.raises(openai.BadRequestError) as caught:
        client.completions.create(model="other", prompt="p")
    assert (caught.value.code, caught.value.param) == ("model_not_found", "model")


def test_unknown_paths_and_methods_answer_in_the_same_shape(server: Server) -> None:
    status, body = server.get("/v2/nothing")
    assert (status, json.loads(body)["error"]["message"]) == (404, "Not Found")
    status, body = server.get("/v1/completions")
    assert (status, json.loads(body)["error"]["type"]) == (405, "invalid_request_error")


def test_parameters_without_effect_at_their_value_are_accepted(
    engine: WireEnd, client: openai.OpenAI, pool: ThreadPoolExecutor
) -> None:
    neutral = {"best_of": 1, "echo": False, "logprobs": None, "presence_penalty": 0.0, "user": "u"}
    extra = {"repetition_penalty": 1.0, "min_p": 0.0, "guided_json": None}
    answer = call(pool, client.completions.create, prompt="p", **neutral, extra_body=extra)
    engine.say(engine.receive(Submit), b"x")
    assert answer.result(TIMEOUT_S).choices[0].text == "x"
