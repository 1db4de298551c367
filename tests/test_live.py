"""End to end: real processes, real sockets, the real model, and what happens when a part of them dies."""

import signal
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from time import monotonic_ns

import httpx
import msgspec
import openai
import psutil
import pyarrow.parquet as pq
import pytest
import zmq
from live import Ear, Load, Pacer, Served, answers, free_port, is_spawned, wait_for

from engine.link import Endpoints
from engine.protocol import VERSION, Knobs, Telemetry
from profiles.iterations import read_iterations

TTL_S = 1.0


@pytest.fixture(scope="module")
def sockets(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    yield tmp_path_factory.mktemp("s")
    Pacer.end_all()


@pytest.fixture(scope="module")
def served(sockets: Path) -> Iterator[Served]:
    served = Served(sockets, "e2e", "--knobs-ttl", str(TTL_S), "--budget", "128")
    yield served
    assert served.pacer.interrupt() == 0


@pytest.fixture
def ear(served: Served) -> Iterator[Ear]:
    ear = Ear(served.endpoints)
    ear.wait_for(lambda _: True, "a heartbeat")
    yield ear
    ear.stop()


def by_controller(telemetry: Telemetry) -> bool:
    return telemetry.knobs.source == "controller"


def by_fallback(telemetry: Telemetry) -> bool:
    return telemetry.knobs.source == "fallback"


def idle(telemetry: Telemetry) -> bool:
    return telemetry.queue.running_requests + telemetry.queue.waiting_requests == 0


def test_thirty_two_chats_stream_at_once_through_the_official_client(served: Served, ear: Ear) -> None:
    client = openai.OpenAI(base_url=f"{served.url}/v1", api_key="none")

    def chat(i: int) -> tuple[int, int, str | None]:
        chunks = list(
            client.chat.completions.create(
                model="pacer-26m",
                messages=[{"role": "user", "content": f"Tell me about the number {i}."}],
                max_tokens=10 + i,
                stream=True,
                stream_options={"include_usage": True},
                extra_body={"ignore_eos": True},
            )
        )
        assert chunks[-1].usage is not None
        finish = [c.choices[0].finish_reason for c in chunks if c.choices][-1]
        return i, chunks[-1].usage.completion_tokens, finish

    with ThreadPoolExecutor(32) as pool:
        chats = list(pool.map(chat, range(32)))
    assert chats == [(i, 10 + i, "length") for i in range(32)]
    assert max(t.batch.decode_tokens for t in ear.heard) > 8, "they ran together"
    ear.wait_for(lambda t: idle(t) and t.kv_usage == 0.0, "all blocks free again")


def test_a_client_that_disconnects_frees_its_blocks_within_one_iteration(served: Served, ear: Ear) -> None:
    body = {"model": "pacer-26m", "prompt": [65] * 400, "max_tokens": 1500, "stream": True, "ignore_eos": True}
    with httpx.stream("POST", f"{served.url}/v1/completions", json=body) as stays:
        assert stays.status_code == 200
        with httpx.stream("POST", f"{served.url}/v1/completions", json=body) as leaves:
            assert leaves.status_code == 200
            ear.wait_for(lambda t: t.batch.decode_tokens == 2, "two streams")
            left_ns = monotonic_ns()
        freed = ear.wait_for(lambda t: t.queue.running_requests == 1, "the blocks of the one that left")
        in_flight = max(t.iteration for t in ear.heard if t.scheduled_ns <= left_ns)
        # The abort travels a millisecond or two: it may just miss the batch formed at the end of the one in flight.
        assert freed.iteration - in_flight <= 2
        assert freed.kv_usage < max(t.kv_usage for t in ear.heard) * 0.7
    ear.wait_for(idle, "the other one gone, too")


@pytest.mark.parametrize(
    "body",
    [
        b'{"model": "pacer-26m", "prompt": [1, 2',
        b'{"model": "gpt-9", "prompt": "x"}',
        b'{"model": "pacer-26m", "prompt": "x", "max_tokens": -3}',
        b'{"model": "pacer-26m", "max_tokens": 4, "prompt": "' + b"x" * 5000 + b'"}',
    ],
    ids=["bad JSON", "unknown model", "negative max_tokens", "over-long prompt"],
)
def test_bad_input_gets_a_400_in_the_shape_of_openai(served: Served, body: bytes) -> None:
    answer = httpx.post(f"{served.url}/v1/completions", content=body, headers={"content-type": "application/json"})
    assert answer.status_code == 400
    assert set(answer.json()["error"]) == {"message", "type", "param", "code"}
    assert answer.json()["error"]["message"]


def test_bad_knobs_change_nothing_but_a_counter(served: Served, ear: Ear) -> None:
    before = ear.wait_for(by_fallback, "the fallback")
    context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
    socket = context.socket(zmq.PUSH)
    socket.connect(served.endpoints.knobs)
    good = msgspec.to_builtins(Knobs(VERSION, before.engine_id, 1000, before.iteration, 256, 256))
    bad = [
        good | {"budget_tokens": float("nan")},
        good | {"budget_tokens": 10**6},
        good | {"version": 99},
        good | {"engine_id": "someone else"},
        good | {"surprise": 1},
    ]
    load = Load(served.url, "poisson:20", "fixed:100,10", 10)
    for message in bad:
        socket.send(msgspec.msgpack.encode(message))
    socket.send(b"plain garbage")
    after = ear.wait_for(lambda t: t.rejected_knobs == before.rejected_knobs + 6, "six rejections")
    assert after.knobs == before.knobs
    assert [r.status for r in load.result().records] == ["completed"] * 10
    assert all(t.knobs == before.knobs for t in ear.heard)
    context.destroy(linger=0)


def alternating() -> Callable[[Telemetry], Knobs]:
    """64 after an even iteration, 256 after an odd one."""
    sequence = 0

    def answer(t: Telemetry) -> Knobs:
        nonlocal sequence
        sequence = max(sequence, t.knobs.sequence) + 1
        budget = 256 if t.iteration % 2 else 64
        return Knobs(VERSION, t.engine_id, sequence, t.iteration, budget, budget)

    return answer


def test_knobs_act_on_the_next_iteration(served: Served) -> None:
    """The echo in telemetry proves which decision an iteration ran under.

    What is asserted counts from the moment a decision was sent, not from the one it answers: how soon this process
    gets the processor to answer is a matter of the machine's load (`benchmarks/knobs_share.py` measures that).
    """
    ear = Ear(served.endpoints, alternating())
    ear.wait_for(by_controller, "its first decision in force")
    Load(served.url, "poisson:1000", "uniform:200-600,60-80", 6).result()  # 60 iterations at least: one a token
    ear.wait_for(idle, "the end")
    ear.stop()
    decisions = {knobs.sequence: knobs for knobs, _ in ear.sent}
    completed_ns = {c.iteration: c.completed_ns for t in ear.heard for c in t.completed}
    controlled = [t for t in ear.heard if t.knobs.sequence in decisions and by_controller(t)]
    for t in controlled:
        decision, force = decisions[t.knobs.sequence], t.knobs
        assert (force.iteration, force.budget_tokens) == (decision.iteration, decision.budget_tokens), "a false echo"
        assert force.chunk_tokens == decision.chunk_tokens
        assert t.batch.total_tokens <= max(force.budget_tokens, t.batch.decode_tokens)
        assert max(t.batch.prefill_chunk_tokens, default=0) <= force.chunk_tokens
    sequences = [t.knobs.sequence for t in controlled]
    assert sequences == sorted(sequences), "an older decision came into force again"

    def newest_sent_before(moment_ns: int) -> int:
        return max((knobs.sequence for knobs, sent_ns in ear.sent if sent_ns < moment_ns), default=0)

    loaded = [
        t for t in ear.heard if t.batch.total_tokens > 0 and {t.iteration - 2, t.iteration - 1} <= completed_ns.keys()
    ]
    assert len(loaded) > 50
    at_once: list[Telemetry] = []
    in_time = 0
    for t in loaded:
        # Sent before the iteration before was formed, a decision had the whole of that one to travel.
        assert t.knobs.sequence >= newest_sent_before(completed_ns[t.iteration - 2]), "a decision came too late"
        answers = [sent_ns for knobs, sent_ns in ear.sent if knobs.iteration == t.iteration - 1]
        if answers and answers[0] < completed_ns[t.iteration - 1]:
            in_time += 1
            at_once += [t] * (t.knobs.iteration == t.iteration - 1)
    assert {t.knobs.budget_tokens for t in at_once} == {64, 256}
    assert len(at_once) > in_time / 2, "the answer to an iteration, sent while it runs, is for the next one"
    ear = Ear(served.endpoints)
    ear.wait_for(by_fallback, "the fallback")
    ear.stop()


def test_kill_9_of_the_controller_loses_no_request_and_a_new_one_takes_over_smoothly(
    served: Served, ear: Ear, tmp_path: Path
) -> None:
    journal = tmp_path / "journal"
    sidecar = served.control("pid", "--slo", "tbt:150", "--journal", str(journal))
    began = ear.wait_for(by_controller, "the controller").iteration
    load = Load(served.url, "poisson:2", "uniform:100-600,20-40", 24)
    ear.wait_for(lambda t: by_controller(t) and t.iteration > began + 60, "load under control")
    sidecar.kill()
    killed_ns = monotonic_ns()
    fallback = ear.wait_for(by_fallback, "the fallback knobs")
    longest_step_ns = max(int(c.device_s * 1e9) for t in ear.heard for c in t.completed)
    assert fallback.scheduled_ns - killed_ns < TTL_S * 1e9 + 2 * longest_step_ns + 0.3e9
    assert fallback.knobs.budget_tokens == 128
    successor = served.control("pid", "--slo", "tbt:150")
    taken_over = ear.wait_for(by_controller, "the new controller")
    assert taken_over.knobs.budget_tokens == pytest.approx(128, rel=0.3), "it starts from the knobs in force"
    assert taken_over.knobs.sequence > fallback.knobs.sequence
    assert [r.status for r in load.result().records] == ["completed"] * 24
    successor.stop()
    _, alive = psutil.wait_procs(sidecar.family, 10)
    assert not alive, "the journal's writer ends after its controller"
    assert read_iterations(journal).num_rows > 50
    ear.wait_for(by_fallback, "the fallback")


def test_the_journal_holds_every_decision_with_its_telemetry(served: Served, ear: Ear, tmp_path: Path) -> None:
    sidecar = served.control("static:budget=96", "--journal", str(tmp_path / "journal"))
    ear.wait_for(by_controller, "the controller")
    Load(served.url, "poisson:10", "fixed:300,20", 8).result()
    ear.wait_for(idle, "the end")
    sidecar.stop()
    rows = [row for part in sorted((tmp_path / "journal").glob("*.parquet")) for row in pq.read_table(part).to_pylist()]
    journalled = {row["telemetry"]["iteration"] for row in rows}
    ran = {t.iteration for t in ear.heard if t.batch.total_tokens > 0 and t.knobs.source == "controller"}
    assert ran <= journalled
    for row in rows:
        assert row["knobs"]["iteration"] == row["telemetry"]["iteration"]
        assert (row["policy"], row["knobs"]["budget_tokens"]) == ("static:budget=96", 96)
        assert row["knobs"]["reason"] == "static"
    iterations = read_iterations(tmp_path / "journal")
    assert sum(iterations["prefill_tokens"].to_pylist()) == 8 * 300
    assert sum(len(gaps) for gaps in iterations["tbt_s"].to_pylist()) == 8 * 19
    ear.wait_for(by_fallback, "the fallback")


def test_kill_9_of_the_engine_ends_its_server_and_the_controller_picks_up_the_next(sockets: Path) -> None:
    served = Served(sockets, "mortal")
    ear = Ear(served.endpoints)
    sidecar = served.control("static:budget=64")
    first = ear.wait_for(by_controller, "control of the first engine")
    body = {"model": "pacer-26m", "prompt": [65] * 100, "max_tokens": 1500, "ignore_eos": True}
    replies: list[httpx.Response] = []
    asking = threading.Thread(
        target=lambda: replies.append(httpx.post(f"{served.url}/v1/completions", json=body, timeout=60)), daemon=True
    )
    asking.start()
    ear.wait_for(lambda t: t.batch.decode_tokens == 1, "a running request")
    served.pacer.child().send_signal(signal.SIGKILL)
    asking.join()
    assert replies[0].status_code == 500
    assert "engine" in replies[0].json()["error"]["message"]
    assert served.pacer.process.wait(30) == 1
    assert sidecar.process.poll() is None
    served.start()
    second = ear.wait_for(by_controller, "control of the second engine")
    assert second.engine_id != first.engine_id
    assert second.knobs.budget_tokens == 64
    for process in (sidecar, served.pacer):
        process.stop()
    ear.stop()


def test_one_controller_serves_two_engines_each_with_a_state_of_its_own(served: Served, sockets: Path) -> None:
    other = Served(sockets, "second", "--budget", "512")
    ears = [Ear(served.endpoints), Ear(other.endpoints)]
    address = ("--socket-dir", str(sockets), "--engine", served.name, "--engine", other.name)
    sidecar = Pacer("control", *address, "--policy", "pid", "--slo", "tbt:100")
    assert ears[0].wait_for(by_controller, "the first").knobs.budget_tokens == 128
    assert ears[1].wait_for(by_controller, "the second").knobs.budget_tokens == 512
    for process in (sidecar, other.pacer):
        process.stop()
    for ear in ears:
        ear.stop()


def test_launch_runs_both_restarts_a_dead_controller_and_ends_with_one_interrupt(sockets: Path) -> None:
    port = free_port()
    launch = Pacer(
        *("launch", "--socket-dir", str(sockets), "--name", "both", "--port", str(port)),
        *("--policy", "pid", "--slo", "tbt:100"),
    )
    wait_for(lambda: answers(f"http://127.0.0.1:{port}/health"), "the server's health")
    ear = Ear(Endpoints.ipc(sockets, "both"))
    ear.wait_for(by_controller, "the controller")
    children = psutil.Process(launch.process.pid).children()
    controller = next(child for child in children if not listens(child, port) and is_spawned(child))
    controller.kill()
    last = ear.heard[-1].knobs.sequence
    ear.wait_for(lambda t: by_controller(t) and t.knobs.sequence > last + 2, "the controller started again")
    ear.stop()
    assert launch.interrupt() == 0


def listens(process: psutil.Process, port: int) -> bool:
    return any(c.laddr and c.laddr.port == port for c in process.net_connections("tcp"))


def test_a_bad_flag_ends_launch_with_the_reason(sockets: Path) -> None:
    launch = Pacer("launch", "--socket-dir", str(sockets), "--name", "bad", "--policy", "magic")
    assert launch.process.wait(60) != 0
