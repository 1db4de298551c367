import asyncio
import json
import re
import signal
import socket
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pytest
from aiohttp import web

from envs.slo import Slo
from envs.trace import Workload
from profiles.bench_report import format_console, summarise
from profiles.load import LoadResult, RequestRecord, StreamReader, replay

TOKEN = b'data: {"choices": [{"index": 0, "text": ""}]}\n\n'
DONE = b"data: [DONE]\n\n"
TOO_LONG = 999


def usage(prompt_tokens: int, output_tokens: int) -> bytes:
    counts = {"prompt_tokens": prompt_tokens, "completion_tokens": output_tokens}
    return b"data: " + json.dumps({"choices": [], "usage": counts}).encode() + b"\n\n"


@dataclass
class Call:
    """One request as the server, which runs the test's script, sees it."""

    body: dict[str, Any]
    request: web.Request
    response: web.StreamResponse = field(default_factory=web.StreamResponse)
    written_s: list[float] = field(default_factory=list)

    async def write(self, data: bytes) -> None:
        await self.response.write(data)
        self.written_s.append(asyncio.get_running_loop().time())

    async def finish(self) -> None:
        """All tokens asked for, the usage, and the end."""
        for _ in range(self.body["max_tokens"]):
            await self.write(TOKEN)
        await self.write(usage(len(self.body["prompt"]), self.body["max_tokens"]) + DONE)


Script = Callable[[Call], Awaitable[None]]


class Endpoint:
    """A server on a loopback port that answers /v1/completions by the test's script."""

    def __init__(self, script: Script) -> None:
        self._script = script
        self.url = ""
        self.calls: list[Call] = []

    async def completions(self, request: web.Request) -> web.StreamResponse:
        call = Call(await request.json(), request)
        self.calls.append(call)
        if len(call.body["prompt"]) == TOO_LONG:
            return web.json_response({"error": "too long for this model"}, status=400)
        await call.response.prepare(request)
        await self._script(call)
        return call.response

    async def models(self, _: web.Request) -> web.Response:
        return web.json_response({"object": "list", "data": [{"id": "tiny", "object": "model"}]})


@asynccontextmanager
async def serving(script: Script) -> AsyncIterator[Endpoint]:
    endpoint = Endpoint(script)
    app = web.Application()
    app.add_routes([web.post("/v1/completions", endpoint.completions), web.get("/v1/models", endpoint.models)])
    runner = web.AppRunner(app, shutdown_timeout=0.1)
    await runner.setup()
    site = web.TCPSite(runner, "127.0.0.1", 0)
    await site.start()
    endpoint.url = f"http://127.0.0.1:{runner.addresses[0][1]}"
    try:
        yield endpoint
    finally:
        await runner.cleanup()


def workload(arrival_s: list[float], prompt: int | list[int] = 5, output: int = 3) -> Workload:
    return Workload(np.array(arrival_s), np.full(len(arrival_s), prompt), np.full(len(arrival_s), output))


def replay_against(script: Script, load: Workload, **options: Any) -> tuple[LoadResult, Endpoint]:
    async def run() -> tuple[LoadResult, Endpoint]:
        async with serving(script) as endpoint, asyncio.timeout(20):
            return await replay(load, endpoint.url + "/v1/", np.random.default_rng(1), **options), endpoint

    return asyncio.run(run())


def test_requests_ask_for_exact_lengths_and_stream_usage() -> None:
    result, endpoint = replay_against(Call.finish, workload([0.0, 0.0], 40), api_key="k", token_ids=(10, 13))
    assert result.model == "tiny"
    for call in endpoint.calls:
        prompt = call.body.pop("prompt")
        assert len(prompt) == 40
        assert set(prompt) == {10, 11, 12}
        assert call.request.headers["Authorization"] == "Bearer k"
        assert call.body == {
            "model": "tiny",
            "max_tokens": 3,
            "ignore_eos": True,
            "temperature": 0,
            "stream": True,
            "stream_options": {"include_usage": True},
        }
    for sent in result.records:
        assert (sent.status, sent.prompt_tokens, sent.output_tokens, len(sent.token_times_s)) == ("completed", 40, 3, 3)
    assert (result.planned_requests, result.interrupted) == (2, False)


def test_the_same_seed_sends_the_same_prompts() -> None:
    _, first = replay_against(Call.finish, workload([0.0, 0.01]))
    _, second = replay_against(Call.finish, workload([0.0, 0.01]))
    prompts = [sorted(call.body["prompt"] for call in endpoint.calls) for endpoint in (first, second)]
    assert prompts[0] == prompts[1]
    assert prompts[0][0] != prompts[0][1]


def test_text_prompts_are_counted_by_the_endpoint() -> None:
    async def script(call: Call) -> None:
        await call.write(TOKEN + TOKEN + usage(57, 2) + DONE)

    result, endpoint = replay_against(script, workload([0.0], prompt=40), prompts="text", model="named")
    assert len(endpoint.calls[0].body["prompt"].split()) == 40
    assert endpoint.calls[0].body["model"] == result.model == "named"
    assert result.records[0].prompt_tokens == 57


def test_a_stalled_server_does_not_delay_later_sends() -> None:
    last_arrived = asyncio.Event()

    async def script(call: Call) -> None:
        if len(call.body["prompt"]) == 2:
            last_arrived.set()
        await last_arrived.wait()  # without open loop the last request would never come
        await call.finish()

    arrivals = [0.0, 0.01, 0.02, 0.03, 0.04, 0.05, 0.06, 0.07]
    ended: list[tuple[int, int]] = []
    load = workload(arrivals, prompt=[1] * 7 + [2])
    result, _ = replay_against(script, load, grace_s=10.0, progress=lambda done, total: ended.append((done, total)))
    assert [r.status for r in result.records] == ["completed"] * 8
    assert [r.scheduled_s for r in result.records] == arrivals
    assert all(r.lateness_s >= 0 for r in result.records)
    assert ended == [(done, 8) for done in range(1, 9)]


def test_measured_times_follow_what_the_server_did() -> None:
    async def script(call: Call) -> None:
        for pause_s in (0.15, 0.02, 0.3, 0.02):
            await asyncio.sleep(pause_s)
            await call.write(TOKEN)
        await call.write(usage(5, 4) + DONE)

    result, endpoint = replay_against(script, workload([0.05], output=4))
    (measured,) = result.records
    assert measured.ttft_s > 0.14
    assert measured.sent_s >= 0.05
    # Both sides read the same clock, so the server's own schedule is the truth, whatever the machine's load.
    np.testing.assert_allclose(measured.itl_s, np.diff(endpoint.calls[0].written_s[:4]), atol=0.1)
    assert measured.e2el_s == pytest.approx(measured.ttft_s + measured.itl_s.sum())
    assert result.duration_s >= measured.sent_s + measured.e2el_s


async def misbehave(call: Call) -> None:
    """A different fault for each prompt length; none for 1."""
    match len(call.body["prompt"]):
        case 1:
            await call.finish()
        case 2:
            await call.write(TOKEN + b'data: {"error": {"message": "out of blocks"}}\n\n')
        case 3:
            await call.write(TOKEN)
            assert call.request.transport is not None
            call.request.transport.close()
        case 4:
            await call.write(TOKEN)
        case 5:
            await call.write(b"data: {broken\n\n")
        case _:
            await call.write(usage(6, 0) + DONE)


def test_failures_of_every_kind_are_counted_and_named() -> None:
    result, _ = replay_against(misbehave, workload([0.0] * 7, prompt=[1, 2, 3, 4, 5, 6, TOO_LONG]))
    assert [r.status for r in result.records] == ["completed"] + ["failed"] * 6
    expected = ["", "out of blocks", "", r"without \[DONE\]", "JSON", "brought no token", "HTTP 400: .*too long"]
    for failed, words in zip(result.records[1:], expected[1:], strict=True):
        assert failed.error
        assert re.search(words, failed.error)
    summary = summarise(result, Slo(e2el_s=60.0))
    assert (summary["completed"], summary["failed"], summary["unfinished"]) == (1, 6, 0)
    assert summary["request_goodput"] == pytest.approx(1 / result.duration_s)
    assert summary["slo_attainment"] == pytest.approx(1 / 7)
    assert "1 failed: the stream brought no token" in format_console(summary)


async def stall_after_two(call: Call) -> None:
    await call.write(TOKEN)
    await call.write(TOKEN)
    if len(call.body["prompt"]) == 1:
        await asyncio.Event().wait()
    await call.write(TOKEN + usage(5, 3) + DONE)


def test_what_still_runs_after_the_grace_time_is_unfinished_and_a_miss() -> None:
    result, _ = replay_against(stall_after_two, workload([0.0, 0.0, 0.0], prompt=[2, 1, 2]), grace_s=1.0)
    assert [r.status for r in result.records] == ["completed", "unfinished", "completed"]
    assert [len(r.token_times_s) for r in result.records] == [3, 2, 3]
    assert not result.interrupted
    assert result.duration_s >= 1.0
    summary = summarise(result, Slo(tbt_s=60.0))
    assert (summary["completed"], summary["failed"], summary["unfinished"]) == (2, 0, 1)
    assert summary["slo_attainment"] == pytest.approx(2 / 3)
    assert summary["output_lens"] == [3, 0, 3]


@pytest.mark.parametrize("interrupt", ["cancel", "ctrl-c"])
def test_an_interrupted_replay_returns_what_it_measured(interrupt: str) -> None:
    # A test run in the background of a shell starts with SIGINT ignored.
    before = signal.signal(signal.SIGINT, signal.default_int_handler)

    async def run() -> LoadResult:
        task = asyncio.current_task()
        assert task is not None
        first_ended = asyncio.Event()

        async def script(call: Call) -> None:
            if len(call.body["prompt"]) == 2:
                await first_ended.wait()
                task.cancel() if interrupt == "cancel" else signal.raise_signal(signal.SIGINT)
                await asyncio.Event().wait()
            await call.finish()

        async with serving(script) as endpoint:
            load = workload([0.0, 0.0, 3600.0], prompt=[1, 2, 3])
            rng = np.random.default_rng(1)
            return await replay(load, endpoint.url, rng, progress=lambda done, total: first_ended.set())

    try:
        result = asyncio.run(run())
    finally:
        signal.signal(signal.SIGINT, before)
    assert result.interrupted
    assert [r.status for r in result.records] == ["completed", "unfinished"]
    assert "INTERRUPTED: 2 of 3 requests were sent" in format_console(summarise(result))


def test_an_endpoint_that_is_not_there_is_said_so() -> None:
    with socket.socket() as held:
        held.bind(("127.0.0.1", 0))  # bound but not listening: refuses connections
        url = f"http://127.0.0.1:{held.getsockname()[1]}"
        with pytest.raises(ConnectionError, match=f"no answer from {url}/v1/models"):
            asyncio.run(replay(workload([0.0]), url, np.random.default_rng(1), model="tiny"))


@pytest.mark.parametrize(
    ("url", "options", "message"),
    [
        ("127.0.0.1:8000", {}, "base_url is '127.0.0.1:8000'"),
        ("http://127.0.0.1:8000", {"token_ids": (9, 9)}, r"token_ids is \(9, 9\)"),
        ("http://127.0.0.1:8000", {"grace_s": 0.0}, "grace_s is 0.0"),
    ],
)
def test_wrong_arguments_are_refused(url: str, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        asyncio.run(replay(workload([0.0]), url, np.random.default_rng(1), **options))


def test_a_stream_is_read_the_same_however_it_is_cut() -> None:
    stream = b": ping\n\nevent: x\n" + TOKEN + TOKEN.replace(b"\n", b"\r\n") + usage(5, 2) + b"data: [DONE]"
    for size in range(1, len(stream) + 1):
        got = RequestRecord(0.0, 0.0, prompt_tokens=10)
        reader = StreamReader(got)
        for start in range(0, len(stream), size):
            reader.feed(stream[start : start + size], float(start))
        reader.close(1e9)
        assert (len(got.token_times_s), got.prompt_tokens, got.output_tokens) == (2, 5, 2)


def test_without_usage_chunks_are_counted() -> None:
    got = RequestRecord(0.0, 0.0, prompt_tokens=10)
    reader = StreamReader(got)
    reader.feed(TOKEN * 3 + DONE, 1.0)
    reader.close(2.0)
    assert (got.output_tokens, got.prompt_tokens) == (3, 10)


def test_latencies_count_from_the_sending_not_the_schedule() -> None:
    got = RequestRecord(1.5, 2.0, prompt_tokens=10, token_times_s=[2.5, 2.75, 3.75], output_tokens=5)
    assert (got.lateness_s, got.ttft_s, got.e2el_s) == (0.5, 0.5, 1.75)
    assert got.itl_s.tolist() == [0.25, 1.0]
    assert got.tbt_s.tolist() == [0.25, 1.0, 0.0, 0.0]  # two of the five tokens came with another one
