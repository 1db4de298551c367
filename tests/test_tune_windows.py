"""The live tuner in the simulator's loop: which budget it finds, when it ends, and what it never recommends."""

from dataclasses import replace

import numpy as np
import pytest
from plant import Loop

from engine.config import EngineConfig
from engine.protocol import Telemetry
from envs.simulator import Plant, Simulation
from envs.slo import Slo
from envs.step_time import StepTimeModel
from envs.trace import Workload, make_workload
from policies.policy import Decision
from profiles.capacity import Trial
from profiles.tune_windows import AT_THE_EDGE, LATE_ENOUGH, RETREAT, SPENT, LiveTuner, Window, edge_tokens

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
        load = make_workload("poisson:1", lengths, np.random.default_rng(seed), n).at_rate(rate)
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
    tuning = Tuning()
    tuner = tuning.serve(share * capacity, 5, starting_at(start))
    assert tuner.done
    assert tuner.best_tokens == tuner.budget_tokens == pytest.approx(best, rel=0.1)
    assert tuner.best_tokens in tuning.begun
    assert tuning.budgets[-1] == tuner.budget_tokens
    assert len(tuning.ended) == len(tuning.begun) <= 12
    assert sum(w.n_spent for w in tuning.ended) >= AT_THE_EDGE


def test_a_candidate_that_is_far_too_large_is_given_up_after_a_few_late_iterations() -> None:
    tuning = Tuning()
    tuning.serve(1.2, 3, starting_at(2048))
    assert tuning.ended[0].cut
    assert tuning.ended[0].n_late == LATE_ENOUGH
    assert tuning.ended[1].budget_tokens < 256
    assert all(b <= 2 * a for a, b in zip(tuning.begun[1:], tuning.begun[2:], strict=False))


def test_traffic_that_never_spends_a_budget_does_not_raise_it() -> None:
    tuning = Tuning(Slo(tbt_s=5.0))
    tuner = tuning.serve(0.5, 1, lengths="uniform:20-40,4-8", n=200)
    assert tuner.done
    assert tuner.best_tokens == tuner.budget_tokens == EngineConfig().budget_tokens
    assert len(tuning.ended) == 1


def starting_at(budget_tokens: int) -> Plant:
    return replace(PLANT, config=replace(PLANT.config, budget_tokens=budget_tokens, chunk_tokens=budget_tokens))


@pytest.mark.parametrize("start", [256, 2048])
def test_a_promise_that_not_even_the_least_budget_keeps_is_given_up(start: int) -> None:
    tuning = Tuning(Slo(tbt_s=0.01), 40)
    tuner = tuning.serve(0.8, 1, starting_at(start), n=600)
    assert tuner.done
    assert tuner.hopeless
    assert not tuner.settled
    assert tuner.best_tokens is None
    assert tuning.begun == [start, 16]
    assert tuning.ended[-1].cut


@pytest.mark.parametrize(("start", "most_windows"), [(48, 1), (48, 2), (2048, 1), (2048, 3)])
def test_a_budget_that_was_never_measured_is_never_the_best(start: int, most_windows: int) -> None:
    tuning = Tuning(most_windows=most_windows)
    tuner = tuning.serve(1.2, 1, starting_at(start), n=600)
    assert tuner.done
    assert not tuner.settled
    kept = [w.budget_tokens for w in tuning.ended if w.quantile_s <= SLO.tbt_s]  # type: ignore[operator]
    assert tuner.best_tokens == max(kept, default=None)
    assert (tuner.best_tokens is None) == (start == 2048 and most_windows == 1)
    assert tuner.edge_tokens is not None
    assert tuner.edge_tokens > (tuner.best_tokens or 0), "a larger one is known of"


def test_a_tuning_that_is_ended_answers_with_the_best() -> None:
    tuning = Tuning(most_windows=1000)
    load = make_workload("poisson:1", LENGTHS, np.random.default_rng(1), 15).at_rate(1.2)
    Simulation(starting_at(48), load, 1, False).run_law(tuning.decide, np.inf)
    assert tuning.tuner is not None
    assert not tuning.tuner.done
    assert tuning.tuner.budget_tokens != tuning.tuner.best_tokens
    tuning.tuner.end()
    assert tuning.tuner.budget_tokens == tuning.tuner.best_tokens


def test_traffic_that_pauses_after_a_late_window_does_not_end_it_in_an_error() -> None:
    """Three prompts are late beside a decode under 2048 tokens; then one request at a time, none beside another."""
    n = 20
    arrival_s = np.concatenate([[0, 0.5, 3, 6], 100.0 * np.arange(1, n)])
    prompts = np.concatenate([[100, 1800, 1800, 1800], np.full(n - 1, 300)])
    load = Workload(arrival_s, prompts, np.concatenate([[1500, 50, 50, 50], np.full(n - 1, 100)]))
    tuning = Tuning(Slo(tbt_s=0.1))
    Simulation(starting_at(2048), load, 1, False).run_law(tuning.decide, np.inf)
    assert tuning.tuner is not None
    assert [w.cut for w in tuning.ended] == [True, False]
    assert tuning.ended[1].tbt_s == []
    assert (tuning.tuner.done, tuning.tuner.best_tokens) == (True, None)


def measured(budget: int, *late: bool) -> Window:
    """Iterations of all the budget, 90 or 110 ms long."""
    return Window(
        budget,
        Slo(tbt_s=0.1, quantile=0.9),
        tokens=[budget] * len(late),
        tbt_s=[0.11 if is_late else 0.09 for is_late in late],
        decodes=[4] * len(late),
        spent=[True] * len(late),
    )


@pytest.mark.parametrize(
    ("windows", "best"),
    [
        ([measured(40, *[False] * SPENT), measured(60, *[False] * SPENT)], 40),
        ([measured(60, *[False] * SPENT), measured(80, *[False] * SPENT)], 60),
        ([measured(60, True, *[False] * SPENT), measured(60, True, True, True, False)], 60),
        ([measured(60, *[False] * SPENT), measured(60, *[True] * 6)], None),
        ([measured(60, *[False] * 10)], None),
        ([measured(40, *[True] * 4)], None),
    ],
    ids=["within", "nearest beyond", "kept in all", "missed in all", "too few beyond", "cut"],
)
def test_the_best_is_within_the_edge_or_has_kept_the_promise(windows: list[Window], best: int | None) -> None:
    tuner = LiveTuner(Loop(None).step(), Slo(tbt_s=0.1, quantile=0.9), 20, lambda _: None, lambda _: None)
    tuner._windows, tuner.edge_tokens = windows, 58.0
    assert tuner._best() == best


def test_the_next_is_the_further_below_the_edge_the_more_failed_until_one_has_held() -> None:
    tuner = LiveTuner(Loop(None).step(), Slo(tbt_s=0.1, quantile=0.9), 20, lambda _: None, lambda _: None)
    cut, broken = measured(80, *[True] * LATE_ENOUGH), measured(60, *[True] * 6, *[False] * SPENT)
    assert (cut.cut, cut.failed, broken.cut, broken.failed) == (True, True, False, True)
    nexts = []
    for window in (cut, broken, measured(60, *[True] * 6, *[False] * 10)):  # the last one was too short to tell
        tuner._windows.append(window)
        nexts.append(tuner._safe(58.0))
    assert nexts == pytest.approx([58.0, 58.0 * RETREAT, 58.0 * RETREAT])
    tuner.best_tokens = 40
    assert tuner._safe(58.0) == 58.0


def test_it_stays_within_the_launch_bounds() -> None:
    config = replace(PLANT.config, max_budget_tokens=96, max_requests=32, budget_tokens=64, chunk_tokens=64)
    tuner = Tuning().serve(1.0, 2, replace(PLANT, config=config))
    assert (tuner.done, tuner.best_tokens) == (True, 96)
    config = replace(PLANT.config, min_budget_tokens=200)
    tuner = Tuning().serve(1.0, 2, replace(PLANT, config=config))
    assert (tuner.done, tuner.hopeless, tuner.best_tokens, tuner.budget_tokens) == (True, True, None, 200)


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
    assert edge_tokens(windows, SLO, 20) is None, "nothing was measured about there"
