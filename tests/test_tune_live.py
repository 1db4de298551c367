"""`pacer tune --live`: the budget of an engine that serves, from its own telemetry, and what its requests feel."""

import argparse
import os
import signal
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from time import monotonic_ns

import msgspec
import optuna
import pytest
import zmq
from live import Ear, Load, Pacer, Served, wait_for
from plant import Loop

from engine.link import ControllerLink, Endpoints, EngineLink
from engine.protocol import Bounds, InForce, Telemetry
from engine.tuned import Tuned
from envs.slo import Slo
from profiles.tune_live import Session, run_live
from profiles.tune_windows import LiveTuner

SLO = Slo(tbt_s=0.15)


class Engine:
    """An engine's end of the real sockets, that says what it is told to."""

    def __init__(self, folder: Path) -> None:
        self.context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
        endpoints = Endpoints.ipc(folder / "s", "e")
        self.link = EngineLink(self.context, [endpoints], "e-1", Bounds(16, 512, 16, 64, 4096))
        self.heard = ControllerLink(self.context, [endpoints])
        self.says = Loop(None).step()

    def publish(self, **change: object) -> None:
        self.says = msgspec.structs.replace(self.says, **change)
        self.link.publish(self.says)

    def close(self) -> None:
        self.heard.close()
        self.link.close()
        self.context.destroy(linger=0)


@pytest.fixture
def engine(tmp_path: Path) -> Iterator[Engine]:
    engine = Engine(tmp_path)
    yield engine
    engine.close()


def session(engine: Engine, clock: Callable[[], int]) -> Session:
    return Session(engine.heard, clock, lambda first: LiveTuner(first, SLO, 20, lambda _: None, lambda _: None))


def hear(tuning: Session, engine: Engine, *changes: dict[str, object]) -> None:
    """Let the engine say each of these, until every one has been answered or refused."""
    for change in changes:
        answered = tuning._sequence
        turns = 0

        def goes_on(_: LiveTuner | None, answered: int = answered, change: dict[str, object] = change) -> bool:
            nonlocal turns
            turns += 1
            assert turns < 100, "no answer"
            if tuning._sequence == answered:
                engine.publish(**change)  # again: a subscription takes its time
            return tuning._sequence == answered

        tuning.run(goes_on)


def test_two_controllers_do_not_fight_over_an_engine(engine: Engine) -> None:
    theirs = InForce(64, 64, 7, 7, "controller")
    with pytest.raises(ValueError, match="another controller answers"):
        hear(session(engine, monotonic_ns), engine, {"knobs": theirs})
    ours = session(engine, monotonic_ns)
    with pytest.raises(ValueError, match="another controller has begun"):
        hear(
            ours,
            engine,
            {"knobs": InForce(64, 64, 7, 7, "fallback")},
            {"knobs": msgspec.structs.replace(theirs, sequence=900)},
        )


def test_an_engine_that_starts_anew_or_falls_silent_ends_the_tuning(engine: Engine) -> None:
    tuning = session(engine, monotonic_ns)
    hear(tuning, engine, {"engine_id": "e-1"})
    with pytest.raises(ConnectionError, match="started anew, as 'e-2'"):
        hear(tuning, engine, {"engine_id": "e-2"})
    hours = iter(range(0, 10**15, 10**12))
    with pytest.raises(ConnectionError, match="no telemetry for 60 s"):
        session(engine, lambda: next(hours)).run(lambda _: True)


def asked(out: Path, **flags: object) -> argparse.Namespace:
    usual = {"slo": "tbt:100 quantile:0.9", "out": out, "storage": None, "trials": 5, "timeout": 50.0, "hold": False}
    return argparse.Namespace(**usual | flags)


@pytest.mark.parametrize(
    ("flags", "told"),
    [
        ({"trials": 0}, "--trials is 0"),
        ({"trials": -2}, "--trials is -2"),
        ({"timeout": 0.0}, "--timeout is 0.0"),
        ({"timeout": -3.0}, "--timeout is -3.0"),
        ({"timeout": float("nan")}, "--timeout is nan"),
        ({"storage": "sqlite:////nowhere/study.db"}, "--storage sqlite:////nowhere/study.db"),
    ],
)
def test_flags_that_will_not_do_are_refused_before_the_engine_is_heard(
    tmp_path: Path, flags: dict[str, object], told: str
) -> None:
    with pytest.raises(ValueError, match=told):
        run_live(asked(tmp_path, **flags), Endpoints.ipc(tmp_path / "s", "none"), None, monotonic_ns, "today")


@pytest.fixture
def served(tmp_path: Path) -> Iterator[Served]:
    """An engine; and the handlers of signals that a tuning sets are taken back."""
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    yield Served(tmp_path / "s", "live", "--knobs-ttl", "1", "--tile", "4", "--budget", "512")
    for number, handler in before.items():
        signal.signal(number, handler)
    Pacer.end_all()


def prompt_seconds(served: Served, ear: Ear) -> float:
    """The least time of a batch of 512 tokens on this machine."""
    Load(served.url, "poisson:5", "fixed:512,2", 4).result()
    large = {t.iteration for t in ear.heard if t.batch.prefill_tokens >= 480}
    return min(c.device_s for t in ear.heard for c in t.completed if c.iteration in large)


def test_a_serving_engine_is_tuned_without_a_request_dropped(served: Served, tmp_path: Path) -> None:
    ear = Ear(served.endpoints)
    # On a machine of any speed: a promise that large batches break by far and small ones keep, and so much traffic
    # that a window takes a few seconds, less than the machine can serve.
    prompt_s = prompt_seconds(served, ear)
    slo, rate = f"tbt:{400 * prompt_s:.0f} quantile:0.75", 0.6 * 512 / 450 / prompt_s
    n_requests = round(110 * rate)
    load = Load(served.url, f"poisson:{rate:.2f}", "uniform:200-700,10-40", n_requests)
    out = tmp_path / "out"
    url = f"sqlite:///{tmp_path / 'study.db'}"
    args = asked(out, slo=slo, storage=url, hold=True, trials=10, timeout=110.0)

    def interrupt_while_it_holds() -> None:
        try:
            wait_for(lambda: over.is_set() or (out / "live.report.html").exists(), "the report", 180)
            end_ns = monotonic_ns() + 3 * 10**9  # the engine's own knobs are back after one second of silence
            held.append(ear.wait_for(lambda t: t.scheduled_ns > end_ns, "telemetry after that"))
        finally:
            if not over.is_set():  # otherwise it found nothing to hold, and an interrupt would end all tests
                os.kill(os.getpid(), signal.SIGINT)

    held: list[Telemetry] = []
    over = threading.Event()
    watcher = threading.Thread(target=interrupt_while_it_holds, daemon=True)
    watcher.start()
    status = run_live(args, served.endpoints, None, monotonic_ns, "today")
    over.set()
    watcher.join()
    assert status == 0
    tuned = Tuned.load(out / "live.tuned.json")
    assert (held[0].knobs.source, held[0].knobs.budget_tokens) == ("controller", tuned.budget_tokens)
    assert 16 <= tuned.budget_tokens < 512, "512 tokens take far longer than promised"
    assert tuned.policy == f"static:budget={tuned.budget_tokens}"
    assert (tuned.tile_tokens, tuned.kv_tokens) == (4, held[0].bounds.kv_tokens)
    assert tuned.budget_tokens in [window["budget_tokens"] for window in tuned.provenance["windows"]]
    (name,) = optuna.get_all_study_names(url)
    trials = optuna.load_study(study_name=name, storage=url).trials
    # On a slow machine the time may be over in the middle of a window, whose trial failed without any figure.
    assert [trial.params["budget_tokens"] for trial in trials if "seconds" in trial.user_attrs] == [
        window["budget_tokens"] for window in tuned.provenance["windows"]
    ]
    assert all(trial.state.is_finished() for trial in trials)
    assert trials[0].user_attrs["cut"]
    assert (out / "live.report.html").exists()
    result = load.result()
    assert [record.status for record in result.records] == ["completed"] * n_requests
    ear.wait_for(lambda t: t.knobs.source == "fallback" and t.knobs.budget_tokens == 512, "its own knobs again")
    ear.stop()
    # What was in force while it was tuned are the candidates.
    in_force = {t.knobs.budget_tokens for t in ear.heard if t.knobs.source == "controller"}
    assert in_force <= {t.params["budget_tokens"] for t in trials} | {tuned.budget_tokens}
    assert all(t.rejected_knobs == 0 for t in ear.heard)


def test_a_promise_that_the_engine_cannot_keep_is_told_and_nothing_is_written(
    served: Served, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    ear = Ear(served.endpoints)
    load = Load(served.url, "poisson:2", "uniform:300-500,30-40", 30)
    args = asked(tmp_path / "out", slo="tbt:1", trials=6, hold=True)
    assert run_live(args, served.endpoints, None, monotonic_ns, "today") == 1
    assert "not even its least, 16 tokens: take a weaker --slo" in capsys.readouterr().out
    assert [path.name for path in (tmp_path / "out").iterdir() if "live" in path.name] == []
    ear.wait_for(lambda t: t.knobs.source == "fallback" and t.knobs.budget_tokens == 512, "its own knobs again")
    ear.stop()
    assert [record.status for record in load.result().records] == ["completed"] * 30
