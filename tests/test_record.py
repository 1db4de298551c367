"""`pacer record`: what a running engine did, on disk: all of it, in order, or counted."""

import resource
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

from engine.config import MAX_TTL_S, EngineConfig
from engine.link import Endpoints
from engine.process import idle_heartbeat_s
from engine.protocol import VERSION, Telemetry, encode
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
    assert sorted(path.name for path in tmp_path.iterdir()) == ["iterations.parquet", "requests.csv"]


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
    for line in ("2 requests still open", "1 request from before", "1 request aborted", "1 request, "):
        assert line in told


def test_iterations_that_were_not_heard_are_counted_and_told(tmp_path: Path) -> None:
    messages = three_requests().link.published
    lost = messages.pop(5)
    recording = store(messages, tmp_path)
    # The lost message told the launch of its own iteration, and the end of the one before.
    rows = pq.read_table(tmp_path / "iterations.parquet")["iteration"].to_pylist()
    assert set(range(rows[0], rows[-1])) - set(rows) == {lost.iteration - 1, lost.iteration}
    assert recording.missing_iterations == 2
    assert "2 iterations missing" in record._summary(recording, tmp_path)


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
    finished = requests_of(tmp_path)
    assert 0 < recording.requests - len(finished) < 60
    assert {output for _, _, output in finished} == {5}


def test_the_requests_of_a_killed_recording_can_be_replayed(tmp_path: Path) -> None:
    recording = Recording(tmp_path)
    for telemetry in three_requests().link.published:
        recording.take(telemetry)
        recording._flush()
    assert [output for _, _, output in requests_of(tmp_path)] == [1, 3, 12], "in the order of their ends"
    replayed = make_workload("trace", f"csv:{tmp_path / 'requests.csv'}", np.random.default_rng(0))
    assert replayed.output_tokens.tolist() == [12, 3, 1]
    assert replayed.arrival_s.tolist() == pytest.approx([0.0, 0.01, 0.02])


def test_a_folder_with_a_recording_is_refused(tmp_path: Path) -> None:
    store(three_requests().link.published, tmp_path)
    with pytest.raises(ValueError, match="another --out"):
        Recording(tmp_path)


def test_a_folder_that_cannot_be_made_is_refused_before_anything_is_heard(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    for out in (tmp_path / "file", tmp_path / "file" / "below"):
        with pytest.raises(ValueError, match=f"cannot record to the folder {out}.*choose another --out"):
            Recording(out)


def test_what_a_full_disk_did_not_take_is_told_and_the_rest_is_whole(tmp_path: Path) -> None:
    """A limit on the size of a file stands for the disk."""
    messages = three_requests().link.published
    half = Recording(tmp_path / "half")
    for telemetry in messages[:-3]:
        half.take(telemetry)
    half._flush()
    kept = requests_of(tmp_path / "half")
    for telemetry in messages[-3:]:
        half.take(telemetry)
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, ((tmp_path / "half" / "requests.csv").stat().st_size + 3, before[1]))
        with pytest.raises(OSError, match="File too large"):
            half.close()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert requests_of(tmp_path / "half") == kept
    assert f"{half.unwritten_rows} rows of these could not be written" in record._summary(half, tmp_path)
    half.close()
    assert [output for _, _, output in requests_of(tmp_path / "half")] == [12, 3, 1]
    assert half.unwritten_rows == 0


@pytest.fixture
def handlers() -> Iterator[None]:
    """The test runner's signal handlers are put back."""
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.fixture(scope="module")
def sockets(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    yield tmp_path_factory.mktemp("s")
    Pacer.end_all()


class Told:
    """An engine's telemetry socket, and the recorder's clock: each look at it is a second later.

    The messages go out 50 s apart, the first to the subscriber; Ctrl-C comes at `interrupt_s`.
    """

    def __init__(self, sockets: Path, name: str, *messages: Telemetry, interrupt_s: int = 10**6) -> None:
        self.endpoints = Endpoints.ipc(sockets, name)
        self.now_s = 0
        self._left = list(messages)
        self._interrupt_s = interrupt_s
        self._next_s = interrupt_s
        self._context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
        self._publisher = self._context.socket(zmq.XPUB)
        self._publisher.bind(self.endpoints.telemetry)

    def clock(self) -> int:
        self.now_s += 1
        if self._publisher.poll(0):
            self._publisher.recv()
            self._next_s = self.now_s
        if self.now_s >= self._next_s and self._left:
            self._publisher.send(encode(self._left.pop(0)))
            self._next_s += 50
        if self.now_s == self._interrupt_s:
            signal.raise_signal(signal.SIGINT)
        return self.now_s * 10**9

    def record(self, out: Path) -> int:
        try:
            return run_record(self.endpoints, out, None, None, self.clock)
        finally:
            self._context.destroy(linger=0)


@pytest.fixture
def quick(handlers: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(record, "TICK_S", 0.01)


@pytest.mark.usefixtures("quick")
def test_an_engine_that_is_not_there_yet_is_waited_for_until_ctrl_c(
    sockets: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert Told(sockets, "nobody", interrupt_s=3 * round(record.SILENCE_S)).record(tmp_path) == 0
    assert list(tmp_path.iterdir()) == []
    assert "heard nothing" in capsys.readouterr().out


@pytest.mark.usefixtures("quick")
def test_an_engine_of_another_version_is_named_at_once(sockets: Path, tmp_path: Path) -> None:
    message = msgspec.structs.replace(three_requests().link.published[0], version=VERSION + 1)
    with pytest.raises(ConnectionError, match="1 message of another protocol: run the engine's version of Pacer"):
        Told(sockets, "other", message).record(tmp_path)


@pytest.mark.usefixtures("quick")
def test_an_idle_engine_is_waited_for_and_one_that_has_gone_is_not(sockets: Path, tmp_path: Path) -> None:
    messages = three_requests().link.published
    told = Told(sockets, "gone", *messages)
    with pytest.raises(ConnectionError, match="no telemetry for 60 s"):
        told.record(tmp_path)
    assert told.now_s > 50 * (len(messages) - 1) + record.SILENCE_S
    assert [output for _, _, output in requests_of(tmp_path)] == [12, 3, 1]


def test_an_idle_engine_speaks_often_enough_whatever_its_time_to_live() -> None:
    for ttl_s in (1.0, 400.0, MAX_TTL_S):
        assert idle_heartbeat_s(EngineConfig(knobs_ttl_s=ttl_s)) <= min(ttl_s / 4, record.SILENCE_S / 4)


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
    (tmp_path / "file").touch()
    refused = [(), ("--out", str(tmp_path), "--duration", "0"), ("--out", str(tmp_path / "file"))]
    for arguments, status in ((("--help",), 0), *((arguments, 2) for arguments in refused)):
        recorder = Pacer("record", "--socket-dir", str(sockets), *arguments)
        assert recorder.process.wait(60) == status
