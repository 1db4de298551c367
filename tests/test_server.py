"""What the server answers: under a real uvicorn, over real ipc sockets, to the official client."""

import asyncio
import json
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import openai
import pytest
from served_wire import (  # noqa: F401 (pytest finds fixtures by import)
    LAST,
    MODEL,
    TIMEOUT_S,
    Server,
    WireEnd,
    call,
    client_fixture,
    engine_fixture,
    pool_fixture,
    server_fixture,
)

from engine.request import Abort, FinishReason, Submit, TokenOutput


def test_a_completion_carries_text_finish_reason_and_usage(
    engine: WireEnd, client: openai.OpenAI, pool: ThreadPoolExecutor
) -> None:
    answer = call(pool, client.completions.create, prompt="abc", max_tokens=5)
    submit = engine.receive(Submit)
    assert submit.prompt_ids == list(b"abc")
    engine.say(submit, b"hello")
    completion = answer.result(TIMEOUT_S)
    assert (completion.choices[0].text, completion.choices[0].finish_reason) == ("hello", "length")
    assert (completion.object, completion.model, completion.created) == ("text_completion", "tiny", 1_800_000_000)
    assert completion.id.startswith("cmpl-")
    usage = completion.usage
    assert (usage.prompt_tokens, usage.completion_tokens, usage.total_tokens) == (3, 5, 8)


def test_a_chat_answer_has_an_assistant_message_and_templates_its_prompt(
    engine: WireEnd, client: openai.OpenAI, pool: ThreadPoolExecutor
) -> None:
    parts = [{"type": "text", "text": "hi"}, {"type": "text", "text": "you"}]
    answer = call(pool, client.chat.completions.create, messages=[{"role": "user", "content": parts}])
    submit = engine.receive(Submit)
    assert submit.prompt_ids == [256, 258, *b"hi\nyou", 259]
    assert submit.sampling.max_tokens == MODEL.max_model_tokens - len(submit.prompt_ids)
    engine.say(submit, b"yo\x00", FinishReason.STOP)
    chat = answer.result(TIMEOUT_S)
    message = chat.choices[0].message
    assert (message.role, message.content, chat.choices[0].finish_reason) == ("assistant", "yo", "stop")
    assert (chat.object, chat.usage.completion_tokens) == ("chat.completion", 3)


def test_sampling_parameters_reach_the_engine_and_defaults_are_openais(
    engine: WireEnd, client: openai.OpenAI, pool: ThreadPoolExecutor
) -> None:
    call(pool, client.completions.create, prompt=[1, 2])
    default = engine.receive(Submit)
    assert (default.sampling.max_tokens, default.sampling.temperature, default.sampling.top_p) == (16, 1.0, 1.0)
    assert (default.sampling.top_k, default.sampling.seed, default.sampling.stop_token_ids) == (0, None, (257,))
    extra = {"top_k": 7, "ignore_eos": True, "stop_token_ids": [10]}
    call(pool, client.completions.create, prompt="x", temperature=0.5, top_p=0.9, seed=3, extra_body=extra)
    asked = engine.receive(Submit)
    assert (asked.sampling.temperature, asked.sampling.top_p, asked.sampling.top_k) == (0.5, 0.9, 7)
    assert (asked.sampling.seed, asked.sampling.stop_token_ids) == (3, (10,))
    for submit in (default, asked):
        engine.say(submit, b"x")


def test_two_prompts_with_n_2_give_four_choices_with_derived_seeds(
    engine: WireEnd, client: openai.OpenAI, pool: ThreadPoolExecutor
) -> None:
    answer = call(pool, client.completions.create, prompt=["a", "bc"], n=2, seed=5, max_tokens=1)
    submits = [engine.receive(Submit) for _ in range(4)]
    assert [(submit.prompt_ids, submit.sampling.seed) for submit in submits] == [
        ([97], 5),
        ([97], 6),
        ([98, 99], 5),
        ([98, 99], 6),
    ]
    engine.send(*(TokenOutput(submits[i].request_id, ord("0") + i, LAST) for i in (2, 0, 3, 1)))
    completion = answer.result(TIMEOUT_S)
    assert [(choice.index, choice.text) for choice in completion.choices] == [(i, str(i)) for i in range(4)]
    assert (completion.usage.prompt_tokens, completion.usage.completion_tokens) == (3, 4)


def test_a_stream_has_a_chunk_for_every_token_and_the_reason_in_the_last(
    engine: WireEnd, client: openai.OpenAI, pool: ThreadPoolExecutor
) -> None:
    stream = call(pool, client.completions.create, prompt="p", stream=True)
    submit = engine.receive(Submit)
    data = "é中!".encode()
    engine.say(submit, data)
    choices = [chunk.choices[0] for chunk in stream.result(TIMEOUT_S)]
    assert [choice.text for choice in choices] == ["", "é", "", "", "中", "!"]
    assert [choice.finish_reason for choice in choices] == [None] * 5 + ["length"]


def test_the_role_comes_with_the_first_token_of_a_streamed_chat_and_usage_in_the_last_chunk(
    engine: WireEnd, client: openai.OpenAI, pool: ThreadPoolExecutor
) -> None:
    options = {"include_usage": True}
    messages = [{"role": "user", "content": "q"}]
    stream = call(pool, client.chat.completions.create, messages=messages, stream=True, stream_options=options)
    submit = engine.receive(Submit)
    engine.send(TokenOutput(submit.request_id, ord("o"), queue_s=0.1, cached_tokens=2))
    engine.send(TokenOutput(submit.request_id, ord("k"), LAST))
    *chunks, last = list(stream.result(TIMEOUT_S))
    assert [(chunk.choices[0].delta.role, chunk.choices[0].delta.content) for chunk in chunks] == [
        ("assistant", "o"),
        (None, "k"),
    ]
    assert all(chunk.usage is None for chunk in chunks)
    assert last.choices == []
    assert (last.usage.prompt_tokens, last.usage.completion_tokens) == (4, 2)
    assert last.usage.prompt_tokens_details.cached_tokens == 2


def test_tokens_are_sent_as_they_come_and_the_stream_ends_with_done(engine: WireEnd, server: Server) -> None:
    connection = server.connect()
    body = json.dumps({"prompt": "p", "stream": True, "n": 2})
    connection.request("POST", "/v1/completions", body, {"content-type": "application/json"})
    first, second = engine.receive(Submit), engine.receive(Submit)
    engine.send(TokenOutput(first.request_id, ord("a")))
    response = connection.getresponse()
    assert response.getheader("content-type") == "text/event-stream; charset=utf-8"

    def event() -> Any:
        line, blank = response.readline(), response.readline()
        assert (line[:6], blank) == (b"data: ", b"\n")
        return line[6:-1] if line == b"data: [DONE]\n" else json.loads(line[6:])

    # Read before the next token exists: nothing may be waiting for more.
    assert event()["choices"] == [{"index": 0, "text": "a", "finish_reason": None, "logprobs": None}]
    engine.send(TokenOutput(second.request_id, ord("b"), LAST))
    assert event()["choices"] == [{"index": 1, "text": "b", "finish_reason": "length", "logprobs": None}]
    engine.send(TokenOutput(first.request_id, ord("c"), LAST))
    assert event()["choices"][0]["text"] == "c"
    assert event() == b"[DONE]"
    assert response.read() == b""
    connection.close()


def test_many_chats_stream_concurrently_each_its_own_text(engine: WireEnd, server: Server) -> None:
    n_streams, n_tokens = 32, 20

    async def chat(client: openai.AsyncOpenAI, text: str) -> str:
        stream: Any = await client.chat.completions.create(
            model="tiny", messages=[{"role": "user", "content": text}], max_tokens=n_tokens, stream=True
        )
        return "".join([chunk.choices[0].delta.content async for chunk in stream])

    async def chats() -> list[str]:
        async with openai.AsyncOpenAI(base_url=server.url + "/v1", api_key="none", max_retries=0) as client:
            return await asyncio.gather(*(chat(client, chr(ord("0") + i)) for i in range(n_streams)))

    with ThreadPoolExecutor(1) as pool:
        answers = pool.submit(asyncio.run, chats())
        submits = [engine.receive(Submit) for _ in range(n_streams)]
        for step in range(n_tokens):
            reason = LAST if step == n_tokens - 1 else None
            engine.send(*(TokenOutput(submit.request_id, submit.prompt_ids[2], reason) for submit in submits))
        assert answers.result(TIMEOUT_S) == [chr(ord("0") + i) * n_tokens for i in range(n_streams)]


def test_a_stop_string_across_tokens_ends_the_answer_and_aborts_in_the_engine(
    engine: WireEnd, client: openai.OpenAI, pool: ThreadPoolExecutor
) -> None:
    answer = call(pool, client.completions.create, prompt="p", stop=["<end>", "never"])
    submit = engine.receive(Submit)
    engine.say(submit, b"yes <em<end>", None)
    assert engine.receive(Abort).request_id == submit.request_id
    completion = answer.result(TIMEOUT_S)
    assert (completion.choices[0].text, completion.choices[0].finish_reason) == ("yes <em", "stop")
    assert completion.usage.completion_tokens == 12


def test_a_streamed_stop_string_is_never_shown_and_tokens_after_it_are_dropped(
    engine: WireEnd, client: openai.OpenAI, pool: ThreadPoolExecutor
) -> None:
    stream = call(pool, client.completions.create, prompt="p", stop="END", n=2, stream=True)
    first, second = engine.receive(Submit), engine.receive(Submit)
    engine.send(*(TokenOutput(first.request_id, byte) for byte in b"aEENDz"))
    assert engine.receive(Abort).request_id == first.request_id
    engine.send(TokenOutput(first.request_id, ord("z")))  # was on its way
    engine.say(second, b"bEN")
    texts, reasons = {0: "", 1: ""}, {}
    for chunk in stream.result(TIMEOUT_S):
        choice = chunk.choices[0]
        assert choice.index not in reasons
        texts[choice.index] += choice.text
        if choice.finish_reason:
            reasons[choice.index] = choice.finish_reason
    assert texts == {0: "aE", 1: "bEN"}
    assert reasons == {0: "stop", 1: "length"}


def test_models_health_ping_and_version_answer(server: Server, client: openai.OpenAI) -> None:
    card: Any = client.models.list().data[0]
    assert (card.id, card.max_model_len) == ("tiny", 60_000)
    assert client.models.retrieve("tiny").created == MODEL.created_s
    with pytest.raises(openai.NotFoundError):
        client.models.retrieve("other")
    assert server.get("/health") == (200, b"")
    assert server.get("/ping")[0] == 200
    assert json.loads(server.get("/version")[1])["version"].count(".") >= 1
