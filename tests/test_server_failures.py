"""Clients that leave or do not read, and an engine that fails."""

from concurrent.futures import ThreadPoolExecutor

import openai
import pytest
from served_wire import (  # noqa: F401 (pytest finds fixtures by import)
    LAST,
    TIMEOUT_S,
    Server,
    WireEnd,
    call,
    client_fixture,
    engine_fixture,
    pool_fixture,
    raw_request,
    server_fixture,
    until,
)

from engine.request import Abort, FinishReason, Submit, TokenOutput


@pytest.mark.parametrize("tokens_before", [0, 1])
@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_leaves_aborts_every_request_of_its_call(
    engine: WireEnd, server: Server, stream: bool, tokens_before: int
) -> None:
    connection = raw_request(server, {"prompt": "p", "n": 2, "stream": stream})
    submits = [engine.receive(Submit), engine.receive(Submit)]
    for submit in submits[:tokens_before]:
        engine.send(TokenOutput(submit.request_id, ord("a")))
        if stream:
            assert connection.recv(1)
    connection.close()
    aborted = {engine.receive(Abort).request_id, engine.receive(Abort).request_id}
    assert aborted == {submit.request_id for submit in submits}
    until(lambda: server.metrics()["vllm:request_success_total{abort}"] == 2)


def test_a_call_that_ended_is_not_aborted_when_its_client_leaves(engine: WireEnd, server: Server) -> None:
    connection = raw_request(server, {"prompt": "p", "stream": True})
    engine.say(engine.receive(Submit), b"x")
    while b"[DONE]" not in connection.recv(65536):
        pass
    connection.close()
    follower = raw_request(server, {"prompt": "q"})
    assert engine.receive(Submit).prompt_ids == [ord("q")]  # and no Abort before it
    follower.close()


def test_a_client_that_does_not_read_delays_nobody_and_still_gets_everything(
    engine: WireEnd, server: Server, client: openai.OpenAI, pool: ThreadPoolExecutor
) -> None:
    n_tokens = 40_000  # several megabytes of chunks, more than the kernel takes for a reader that does not read
    slow = raw_request(server, {"prompt": "slow", "max_tokens": n_tokens, "stream": True}, receive_buffer_bytes=4096)
    slow_submit = engine.receive(Submit)
    token = TokenOutput(slow_submit.request_id, ord("s"))
    for _ in range(n_tokens // 1000):
        engine.send(*[token] * 1000)
    quick = call(pool, client.completions.create, prompt="quick")
    engine.say(engine.receive(Submit), b"done")
    assert quick.result(TIMEOUT_S).choices[0].text == "done"
    engine.send(TokenOutput(slow_submit.request_id, ord("!"), LAST))
    received = bytearray()
    while not received.endswith(b"0\r\n\r\n"):
        data = slow.recv(1 << 20)
        assert data, "closed before the end"
        received += data
    assert received.count(b'"text":"s"') == n_tokens
    assert received.count(b'"text":"!"') == 1
    slow.close()


def test_when_the_engine_dies_every_open_request_ends_with_an_error_at_once(
    engine: WireEnd, server: Server, client: openai.OpenAI, pool: ThreadPoolExecutor
) -> None:
    whole = call(pool, client.completions.create, prompt="whole")
    engine.receive(Submit)
    waiting = call(pool, client.completions.create, prompt="waiting", stream=True)
    engine.receive(Submit)
    begun = call(pool, client.completions.create, prompt="begun", stream=True)
    engine.send(TokenOutput(engine.receive(Submit).request_id, ord("a")))
    chunks = begun.result(TIMEOUT_S)
    assert next(chunks).choices[0].text == "a"
    server.engine_died()
    for future in (whole, waiting):
        with pytest.raises(openai.InternalServerError, match="code -9") as caught:
            future.result(TIMEOUT_S)
        assert caught.value.code == "engine_failed"
    with pytest.raises(openai.APIError, match="code -9"):
        next(chunks)
    with pytest.raises(openai.InternalServerError, match="code -9"):
        client.completions.create(model="tiny", prompt="later")
    assert [server.get(path)[0] for path in ("/health", "/ping", "/v1/models")] == [503, 503, 200]
    assert server.metrics()["vllm:request_success_total{abort}"] == 3


def test_a_request_that_the_engine_gives_up_is_an_error_that_says_why_and_its_siblings_are_aborted(
    engine: WireEnd, client: openai.OpenAI, pool: ThreadPoolExecutor
) -> None:
    answer = call(pool, client.completions.create, prompt="p", n=2)
    first, second = engine.receive(Submit), engine.receive(Submit)
    engine.send(TokenOutput(first.request_id, -1, FinishReason.ABORT, error="out of memory"))
    with pytest.raises(openai.InternalServerError, match="out of memory"):
        answer.result(TIMEOUT_S)
    assert engine.receive(Abort).request_id == second.request_id
