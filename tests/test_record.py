"""`pacer record`: what a running engine did, on disk: all of it, in order, or counted."""

import signal
from collections.abc import Iterator
from pathlib import Path
from tempfile import TemporaryDirectory

import msgspec
import numpy as np
import psutil
import pyarrow.parquet as pq
import pytest
import zmq
from hypothesis import given, settings
from hypothesis import strategies as st
from live import Ear, Load, Pacer, Served, wait_for
from plant import Loop

from engine.config import EngineConfig
from engine.link import Endpoints
from engine.protocol import Telemetry, encode
from engine.request import Abort
from envs.trace import make_workload
from profiles import record
from profiles.iterations import SCHEMA
from profiles.record import Recording, run_record

HEADER = "arrival_s,prompt_tokens,output_tokens"


def requests_of(folder: Path) -> list[tuple[float, int, int]]:
    file = folder / "requests.csv"
    if not file.exists():
        return []
    header, *lines = file.read_text().splitlines()
    assert header == HEADER
    return [(float(arrival), int(prompt), int(output)) for arrival, prompt, output in (li.split(",") for li in lines)]


def three_requests() -> Loop:
    """The first to come is the last to end; each iteration takes 10 ms."""
    loop = Loop(None, fixed_s=0.01, per_token_s=0.0)
    loop.step()
    for name, prompt_tokens, output_tokens in (("long", 100, 12), ("short", 50, 3), ("single", 20, 1)):
        loop.submit(name, prompt_tokens, output_tokens)
        loop.step()
    while loop.core.scheduler.has_work:
        loop.step()
    loop.step()
    return loop


def store(messages: list[Telemetry], folder: Path) -> Recording:
    recording = Recording(folder)
    for telemetry in messages:
        recording.take(telemetry)
    recording.close()
    return recording


def test_requests_are_stored_by_arrival_and_can_be_replayed(tmp_path: Path) -> None:
    recording = store(three_requests().link.published, tmp_path)
    # An idle step of the loop takes 10 ms, too: the first request comes 10 ms after the first message.
    assert (tmp_path / "requests.csv").read_text() == f"{HEADER}\n0.01,100,12\n0.02,50,3\n0.03,20,1\n"
    assert recording.requests == 3
    assert recording.open_requests == recording.early_requests == recording.aborted_requests == 0
    replayed = make_workload("trace", f"csv:{tmp_path / 'requests.csv'}", np.random.default_rng(0))
    assert replayed.arrival_s.tolist() == pytest.approx([0.0, 0.01, 0.02])
    assert not (tmp_path / "requests.parquet").exists()


def test_every_iteration_is_stored_on_the_clock_of_the_requests(tmp_path: Path) -> None:
    recording = store(three_requests().link.published, tmp_path)
    table = pq.read_table(tmp_path / "iterations.parquet")
    assert table.schema.equals(SCHEMA)
    assert table["iteration"].to_pylist() == list(range(1, 13))
    assert table["time_s"].to_pylist() == pytest.approx([0.02 + 0.01 * i for i in range(12)])
    assert table["prefill_tokens"].to_pylist() == [100, 50, 20, *[0] * 9]
    assert table["decode_tokens"].to_pylist() == [0, 1, 2, 2, *[1] * 8]
    assert [len(gaps) for gaps in table["tbt_s"].to_pylist()] == table["decode_tokens"].to_pylist()
    assert table["ttft_s"].to_pylist()[2] == pytest.approx([0.01])
    assert (recording.iterations, recording.missing_iterations) == (12, 0)


def test_what_cannot_be_stored_is_counted_and_told(tmp_path: Path) -> None:
    loop = Loop(None)
    loop.submit("early", 30, 4)
    loop.step()
    heard = len(loop.link.published)
    loop.submit("done", 30, 4)
    for name in ("aborted", "open"):
        loop.submit(name, 40, 100)
    for _ in range(10):
        loop.step()
    loop.core.scheduler.abort(Abort("aborted"))
    loop.submit("another in its slot", 50, 100)
    for _ in range(3):
        loop.step()
    messages = loop.link.published[heard:]
    recording = store(messages, tmp_path / "all")
    assert [(prompt, output) for _, prompt, output in requests_of(tmp_path / "all")] == [(30, 4)]
    assert (recording.early_requests, recording.open_requests, recording.aborted_requests) == (1, 2, 1)
    told = record._summary(recording, tmp_path)
    for line in ("2 requests were still open", "1 requests had come before", "1 requests, at least, were aborted"):
        assert line in told


def test_iterations_that_were_not_heard_are_counted_and_told(tmp_path: Path) -> None:
    messages = three_requests().link.published
    lost = messages.pop(5)
    recording = store(messages, tmp_path)
    # The lost message told the launch of its own iteration, and the end of the one before.
    rows = pq.read_table(tmp_path / "iterations.parquet")["iteration"].to_pylist()
    assert set(range(rows[0], rows[-1])) - set(rows) == {lost.iteration - 1, lost.iteration}
    assert recording.missing_iterations == 2
    assert "2 iterations are missing" in record._summary(recording, tmp_path)


@settings(max_examples=40, deadline=None)
@given(data=st.data())
def test_every_request_is_stored_or_counted_whatever_happens_to_it(data: st.DataObject) -> None:
    """Random requests, aborts and preemptions; the recording begins and ends in the middle of it."""
    config = EngineConfig(max_model_tokens=320, kv_blocks=40, max_requests=8, budget_tokens=64, chunk_tokens=64)
    loop = Loop(None, config=config)
    scheduler = loop.core.scheduler
    mix = data.draw(st.lists(st.tuples(st.integers(1, 200), st.integers(1, 60)), min_size=1, max_size=25))
    begins, ends = sorted(data.draw(st.tuples(st.integers(0, 40), st.integers(0, 200))))
    arrivals_ns: list[int] = []
    aborted, tokens_before = set[int](), 0
    for step in range(ends + 1):
        for request in mix[len(arrivals_ns) :][: data.draw(st.integers(0, 2))]:
            loop.submit(str(len(arrivals_ns)), *request)
            arrivals_ns.append(loop.clock())
        victim = data.draw(st.integers(0, 10 * len(mix)))
        if any(r.id == str(victim) for r in (*scheduler.running, *scheduler.waiting)):
            scheduler.abort(Abort(str(victim)))
            aborted.add(victim)
        if step == begins:
            tokens_before = len(loop.tokens)
        loop.step()
    messages = loop.link.published[begins:]
    with TemporaryDirectory() as folder:
        recording = store(messages, Path(folder))
        stored = requests_of(Path(folder))
    # Tokens are handed over before the message that tells their iteration's measurements.
    ended = [int(t.request_id) for t in loop.tokens[tokens_before:] if t.finish_reason is not None]
    start_ns = messages[0].scheduled_ns
    expected = sorted((arrivals_ns[i], *mix[i]) for i in ended if arrivals_ns[i] >= start_ns)
    assert sorted((start_ns + round(1e9 * a), p, o) for a, p, o in stored) == expected
    assert [a for a, _, _ in stored] == sorted(a for a, _, _ in stored)
    assert recording.early_requests == len(ended) - len(expected)
    untold = sum(t.finish_reason is not None for t in loop.core._tokens)
    assert recording.open_requests == len(scheduler.running) + len(scheduler.waiting) + untold
    assert recording.aborted_requests <= len(aborted)
    assert recording.missing_iterations == 0


def test_a_killed_recording_has_lost_no_more_than_a_part_and_held_none_in_memory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(record, "ROWS_A_PART", 20)
    loop = Loop(None, config=EngineConfig(max_requests=4))
    for i in range(60):
        loop.submit(str(i), 30, 5)
    recording = Recording(tmp_path)
    for _ in range(10**4):
        if not loop.core.scheduler.has_work:
            break
        recording.take(loop.step())
        assert len(recording._iteration_rows) < 20
    # No close: what is on disk is all there is.
    stored = pq.read_table(tmp_path / "iterations.parquet")["iteration"].to_pylist()
    assert stored == list(range(1, len(stored) + 1))
    assert 0 < recording.iterations - len(stored) < 20
    finished = pq.read_table(tmp_path / "requests.parquet")
    assert finished.column_names == HEADER.split(",")
    assert 0 < recording.requests - finished.num_rows < 60
    assert set(finished["output_tokens"].to_pylist()) == {5}


def test_a_folder_with_a_recording_is_refused(tmp_path: Path) -> None:
    store(three_requests().link.published, tmp_path)
    with pytest.raises(ValueError, match="another --out"):
        Recording(tmp_path)


@pytest.fixture
def handlers() -> Iterator[None]:
    """The test runner's signal handlers are put back."""
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.mark.usefixtures("handlers")
def test_an_engine_that_is_not_there_ends_the_recording_with_the_reason(
    tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(record, "SILENCE_S", 0.1)
    monkeypatch.setattr(record, "TICK_S", 0.05)
    out = tmp_path_factory.mktemp("out")
    with pytest.raises(ConnectionError, match="is the engine running"):
        run_record(Endpoints.ipc(tmp_path_factory.mktemp("s"), "nobody"), out, None, None)
    assert list(out.iterdir()) == []
    assert "heard nothing" in capsys.readouterr().out


@pytest.fixture(scope="module")
def sockets(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    yield tmp_path_factory.mktemp("s")
    Pacer.end_all()


def test_an_engine_that_starts_anew_ends_the_recording_and_what_came_before_is_stored(
    sockets: Path, tmp_path: Path
) -> None:
    endpoints = Endpoints.ipc(sockets, "told")
    context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
    publisher = context.socket(zmq.XPUB)
    publisher.bind(endpoints.telemetry)
    recorder = Pacer("record", "--socket-dir", str(sockets), "--engine", "told", "--out", str(tmp_path / "out"))
    assert publisher.poll(60_000), "nobody subscribed"
    messages = three_requests().link.published
    for message in (*messages, msgspec.structs.replace(messages[0], engine_id="e-2")):
        publisher.send(encode(message))
    assert recorder.process.wait(60) == 2
    assert [output for _, _, output in requests_of(tmp_path / "out")] == [12, 3, 1]
    assert pq.read_table(tmp_path / "out" / "iterations.parquet").num_rows == 12
    context.destroy(linger=0)


def test_a_live_engine_is_recorded_beside_its_controller_until_ctrl_c(sockets: Path, tmp_path: Path) -> None:
    served = Served(sockets, "live", "--budget", "128")
    served.control("static:budget=96")
    ear = Ear(served.endpoints)
    ear.wait_for(lambda t: t.knobs.source == "controller", "the controller")
    out = tmp_path / "out"
    recorder = Pacer("record", "--socket-dir", str(sockets), "--engine", "live", "--out", str(out))
    wait_for(lambda: len(psutil.Process(recorder.process.pid).net_connections("unix")) >= 2, "its sockets")
    for _ in range(2):
        ear.wait_for(lambda _: True, "a heartbeat that it hears, too")
    result = Load(served.url, "poisson:8", "uniform:50-300,1-20", 20).result()
    ear.wait_for(lambda t: t.queue.running_requests + t.queue.waiting_requests == 0, "the end")
    assert recorder.interrupt() == 0
    assert served.pacer.process.poll() is None
    lengths = [(prompt, output) for _, prompt, output in requests_of(out)]
    assert lengths == [(r.prompt_tokens, r.output_tokens) for r in result.records]
    ear.stop()


def test_record_has_help_and_refuses_what_it_cannot_do(sockets: Path, tmp_path: Path) -> None:
    for arguments, status in ((("--help",), 0), ((), 2), (("--out", str(tmp_path), "--duration", "0"), 2)):
        recorder = Pacer("record", "--socket-dir", str(sockets), *arguments)
        assert recorder.process.wait(60) == status
