"""`pacer tune --live`: the budget of an engine that serves, from its own telemetry, and what its requests feel."""

import argparse
import os
import signal
import threading
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from time import monotonic_ns

import msgspec
import numpy as np
import optuna
import pytest
import zmq
from live import Ear, Load, Pacer, Served, wait_for
from plant import Loop

from engine.config import EngineConfig
from engine.link import ControllerLink, Endpoints, EngineLink
from engine.protocol import Bounds, InForce, Telemetry
from engine.tuned import Tuned
from envs.simulator import Plant, Simulation
from envs.slo import Slo
from envs.step_time import StepTimeModel
from envs.trace import make_workload
from policies.policy import Decision
from profiles.capacity import Trial, at_rate
from profiles.tune_live import Session, run_live
from profiles.tune_windows import AT_THE_EDGE, LATE_ENOUGH, SPENT, LiveTuner, Window, edge_tokens

SLO = Slo(tbt_s=0.15)
CPU = StepTimeModel.from_formula((0.010, 0.0005, 1e-7), (0.012, 0.0009, 1e-7, 2e-8, 0.0005)).with_noise(0.05)
PLANT = Plant(EngineConfig(tile_tokens=4), CPU)
LENGTHS = "uniform:100-900,20-120"


class Tuning:
    """A tuner in the simulator's loop."""

    def __init__(self, slo: Slo = SLO, most_windows: int = 20) -> None:
        self.begun: list[int] = []
        self.ended: list[Window] = []
        self.budgets: list[int] = []
        self._make = lambda first: LiveTuner(first, slo, most_windows, self.begun.append, self.ended.append)
        self.tuner: LiveTuner | None = None

    def decide(self, telemetry: Telemetry, now_ns: int = 0) -> Decision:
        if self.tuner is None:
            self.tuner = self._make(telemetry)
        decision = self.tuner.decide(telemetry)
        self.budgets.append(decision.budget_tokens)
        return decision

    def serve(self, rate: float, seed: int, plant: Plant = PLANT, lengths: str = LENGTHS, n: int = 1500) -> LiveTuner:
        load = at_rate(make_workload("poisson:1", lengths, np.random.default_rng(seed), n), rate)
        Simulation(plant, load, seed, False).run_law(self.decide, np.inf)
        assert self.tuner is not None
        return self.tuner


@pytest.fixture(scope="module")
def simulated() -> tuple[int, float]:
    """The budget with the highest capacity in simulation, and that capacity."""
    load = make_workload("poisson:1", LENGTHS, np.random.default_rng(0), 600)
    trials = {b: Trial(PLANT, load, SLO, 0, f"static:budget={b}") for b in range(104, 164, 4)}
    capacities = {budget: trial.capacity(1.6, 0.005) for budget, trial in trials.items()}
    best = max(capacities, key=lambda budget: capacities[budget])
    assert 104 < best < 160
    return best, capacities[best]


@pytest.mark.parametrize("share", [0.5, 0.8, 0.95])
@pytest.mark.parametrize("start", [32, 2048])
def test_it_finds_the_budget_that_the_simulator_finds(simulated: tuple[int, float], share: float, start: int) -> None:
    best, capacity = simulated
    plant = replace(PLANT, config=replace(PLANT.config, budget_tokens=start, chunk_tokens=start))
    tuning = Tuning()
    tuner = tuning.serve(share * capacity, 5, plant)
    assert tuner.done
    assert tuner.budget_tokens == pytest.approx(best, rel=0.1)
    assert tuning.budgets[-1] == tuner.budget_tokens
    assert len(tuning.ended) == len(tuning.begun) <= 12
    assert sum(w.n_spent for w in tuning.ended) >= AT_THE_EDGE


def test_a_candidate_that_is_far_too_large_is_given_up_after_a_few_late_iterations() -> None:
    plant = replace(PLANT, config=replace(PLANT.config, budget_tokens=2048, chunk_tokens=2048))
    tuning = Tuning()
    tuning.serve(1.2, 3, plant)
    assert tuning.ended[0].cut
    assert tuning.ended[0].n_late == LATE_ENOUGH
    assert tuning.ended[1].budget_tokens < 256
    assert all(b <= 2 * a for a, b in zip(tuning.begun[1:], tuning.begun[2:], strict=False))


def test_traffic_that_never_spends_a_budget_does_not_raise_it() -> None:
    tuning = Tuning(Slo(tbt_s=5.0))
    tuner = tuning.serve(0.5, 1, lengths="uniform:20-40,4-8", n=200)
    assert tuner.done
    assert tuner.budget_tokens == EngineConfig().budget_tokens
    assert len(tuning.ended) == 1


def test_it_stays_within_the_launch_bounds() -> None:
    config = replace(PLANT.config, max_budget_tokens=96, max_requests=32, budget_tokens=64, chunk_tokens=64)
    tuner = Tuning().serve(1.0, 2, replace(PLANT, config=config))
    assert (tuner.done, tuner.budget_tokens) == (True, 96)
    config = replace(PLANT.config, min_budget_tokens=200)
    tuner = Tuning().serve(1.0, 2, replace(PLANT, config=config))
    assert (tuner.done, tuner.budget_tokens) == (True, 200)


def test_a_promise_without_a_bound_on_gaps_is_refused() -> None:
    with pytest.raises(ValueError, match="tbt:MILLISECONDS"):
        Tuning(Slo(ttft_s=1.0)).decide(Loop(None).step())


def test_the_edge_is_where_the_quantile_of_the_time_meets_the_promise() -> None:
    rng = np.random.default_rng(0)
    windows = []
    for budget in (100, 200):
        window = Window(budget, SLO)
        window.tokens = rng.integers(budget // 2, budget + 1, 4 * SPENT).tolist()
        factors = np.exp(0.05 * rng.standard_normal(4 * SPENT))
        window.tbt_s = ((0.02 + 0.0008 * np.array(window.tokens)) * factors).tolist()
        window.decodes = [4] * len(window.tokens)
        window.spent = [tokens >= 0.9 * budget for tokens in window.tokens]
        windows.append(window)
    # P99 of the noise is exp(2.33 * 0.05) = 1.12: 0.15 s / 1.12 = 0.134 s is the time of 142 tokens.
    assert edge_tokens(windows, SLO, 140) == pytest.approx(142, rel=0.05)
    median = edge_tokens(windows, replace(SLO, quantile=0.5), 140)
    assert median == pytest.approx(162, rel=0.03)
    assert edge_tokens([Window(100, SLO)], SLO, 100) is None


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


@pytest.fixture
def served(tmp_path: Path) -> Iterator[Served]:
    yield Served(tmp_path / "s", "live", "--knobs-ttl", "1", "--tile", "4", "--budget", "512")
    Pacer.end_all()


def test_a_serving_engine_is_tuned_without_a_request_dropped(served: Served, tmp_path: Path) -> None:
    ear = Ear(served.endpoints)
    load = Load(served.url, "poisson:1.5", "uniform:100-500,10-40", 80)
    out = tmp_path / "out"
    url = f"sqlite:///{tmp_path / 'study.db'}"
    args = argparse.Namespace(slo="tbt:100 quantile:0.9", out=out, storage=url, trials=5, timeout=50.0, hold=True)
    before = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]

    def interrupt_while_it_holds() -> None:
        try:
            wait_for((out / "report.html").exists, "the report")
            end_ns = monotonic_ns() + 3 * 10**9  # the engine's own knobs are back after one second of silence
            held.append(ear.wait_for(lambda t: t.scheduled_ns > end_ns, "telemetry after that"))
        finally:
            os.kill(os.getpid(), signal.SIGINT)

    held: list[Telemetry] = []
    watcher = threading.Thread(target=interrupt_while_it_holds, daemon=True)
    watcher.start()
    try:
        assert run_live(args, served.endpoints, None, monotonic_ns, "today") == 0
    finally:
        for number, handler in zip((signal.SIGINT, signal.SIGTERM), before, strict=True):
            signal.signal(number, handler)
    watcher.join()
    tuned = Tuned.load(out / "live.tuned.json")
    assert (held[0].knobs.source, held[0].knobs.budget_tokens) == ("controller", tuned.budget_tokens)
    assert 16 <= tuned.budget_tokens < 512, "512 tokens take a CPU far longer than 100 ms"
    assert tuned.policy == f"static:budget={tuned.budget_tokens}"
    (name,) = optuna.get_all_study_names(url)
    trials = optuna.load_study(study_name=name, storage=url).trials
    # On a slow machine the time may be over in the middle of a window, whose trial failed without any figure.
    assert [trial.params["budget_tokens"] for trial in trials if "seconds" in trial.user_attrs] == [
        window["budget_tokens"] for window in tuned.provenance["windows"]
    ]
    assert all(trial.state.is_finished() for trial in trials)
    assert trials[0].user_attrs["cut"]
    assert (out / "report.html").exists()
    result = load.result()
    assert [record.status for record in result.records] == ["completed"] * 80
    ear.wait_for(lambda t: t.knobs.source == "fallback" and t.knobs.budget_tokens == 512, "its own knobs again")
    ear.stop()
    # What was in force while it was tuned are the candidates.
    in_force = {t.knobs.budget_tokens for t in ear.heard if t.knobs.source == "controller"}
    assert in_force <= {t.params["budget_tokens"] for t in trials} | {tuned.budget_tokens}
    assert all(t.rejected_knobs == 0 for t in ear.heard)
