"""Training: what scenarios are drawn, that PPO learns from them, that it can be interrupted, and what comes out."""

import sys
from pathlib import Path

import numpy as np
import pytest
from gymnasium.vector import AutoresetMode
from stable_baselines3 import PPO

import run
from engine.config import EngineConfig
from envs.arrivals import gamma_arrivals
from envs.serving_env import Episodes
from envs.serving_vector_env import ServingVectorEnv
from envs.simulator import Plant
from envs.slo import Slo
from envs.step_time import StepTimeModel
from envs.trace import Lengths, Workload
from policies import train
from policies.rl import Trained
from policies.scenarios import FEWEST, MOST, Scenarios, fluid_capacity
from policies.train import Lesson, SideBySide, layers_of, teach
from profiles.capacity import CLAIRVOYANT, Trial
from profiles.training import shares

MODEL = StepTimeModel.from_formula((4.7e-3, 7.3e-6, 35e-9), (1.3e-3, 20.9e-6, 45.5e-9, 1.045e-9, 0.28e-3))
CONFIG = EngineConfig(max_requests=64, max_budget_tokens=2048, max_model_tokens=4096, kv_blocks=20_000)
SLO = Slo(tbt_s=0.02)
SHORT = Lengths(np.arange(50, 400), np.arange(400, 50, -1) // 10)
LONG = Lengths(np.arange(1000, 3000), np.arange(1000, 3000) // 50)


def no_end() -> float:
    return np.inf


def show(steps: int, text: str) -> None:
    pass


def scenarios(seed: int = 0) -> Scenarios:
    return Scenarios(MODEL, CONFIG, [SHORT, LONG], SLO, seed)


def test_scenarios_are_drawn_far_and_wide_and_again_from_the_same_seed() -> None:
    source = scenarios()
    drawn = [source(np.random.default_rng(seed)) for seed in range(200)]
    slos = np.array([scenario.slo.tbt_s for scenario in drawn])
    assert 0.02 / 3 <= slos.min() < 0.01 and 0.04 < slos.max() <= 0.06
    assert {scenario.plant.dead_time_iterations for scenario in drawn} == {1, 2, 3}
    assert all(FEWEST <= len(scenario.workload) <= MOST for scenario in drawn)
    batch = (20, 20_000, 1, 300, 45_000.0)
    errors = np.array([s.step_time.mean_s(*batch) / s.plant.step_time.mean_s(*batch) for s in drawn if s.step_time])
    assert 0.2 < np.mean(errors == 1.0) < 0.6
    assert errors.min() < 0.8 and errors.max() > 1.25
    noise = [scenario.plant.step_time.factor(0.99, mixed=True) for scenario in drawn]
    assert min(noise) < 1.05 and 1.2 < max(noise) < 1.3
    again = scenarios()(np.random.default_rng(7))
    assert again.workload.arrival_s.tobytes() == drawn[7].workload.arrival_s.tobytes()
    assert again.plant.step_time.coefficients.tobytes() == drawn[7].plant.step_time.coefficients.tobytes()


@pytest.mark.parametrize(("slo", "message"), [(Slo(ttft_s=1.0), "add tbt"), (Slo(tbt_s=1e-4), "too short")])
def test_promises_that_cannot_be_trained_for_are_refused(slo: Slo, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Scenarios(MODEL, CONFIG, [SHORT], slo, 0)


@pytest.mark.parametrize("kind", [SHORT, LONG])
def test_the_fluid_capacity_is_near_what_clairvoyance_carries(kind: Lengths) -> None:
    rng = np.random.default_rng(0)
    rows = rng.integers(len(kind), size=2000)
    workload = Workload(gamma_arrivals(rng, 2000, 1.0), kind.prompt_tokens[rows], kind.output_tokens[rows])
    carried = Trial(Plant(CONFIG, MODEL.with_noise(0.04)), workload, SLO, 0, CLAIRVOYANT).capacity()
    assert 0.6 < fluid_capacity(MODEL, kind, 0.02, CONFIG) / carried < 1.3


def test_an_episode_in_the_trainers_hands_earns_a_share_of_what_can_be_earned() -> None:
    env = SideBySide(ServingVectorEnv(scenarios(), 4, Episodes(), AutoresetMode.SAME_STEP, "limit"), seed=5)
    plain = ServingVectorEnv(scenarios(), 4, Episodes(), AutoresetMode.SAME_STEP, "limit")
    observations, _ = plain.reset(seed=5)
    assert env.reset().tobytes() == observations.tobytes()  # type: ignore[union-attr]
    sums, requests, seen = np.zeros(4), [len(plain.scenario(i).workload) for i in range(4)], 0
    while seen < 4:
        _, rewards, terminated, _, info = plain.step(np.zeros((4, 2), np.float32))
        _, _, over, infos = env.step(np.zeros((4, 2), np.float32))
        sums += rewards
        assert over.tolist() == terminated.tolist()
        for i in np.flatnonzero(over):
            assert infos[i]["episode"]["r"] == pytest.approx(sums[i] / (2 * requests[i]))
            assert infos[i]["terminal_observation"].tobytes() == info["final_obs"][i].tobytes()
            assert infos[i]["episode"]["r"] <= 1.0
            sums[i], requests[i], seen = 0.0, len(plain.scenario(i).workload), seen + 1


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {"N_ENVS": 16, "ROLLOUT": 128, "BATCH": 512, "CHECK_EVERY": 4, "CHECKED": 16}.items():
        monkeypatch.setattr(train, name, value)


def lesson(folder: Path, steps: int) -> Lesson:
    return Lesson("knobs", scenarios(0), scenarios(1), steps, 0, folder / "seed-0")


@pytest.mark.usefixtures("small")
def test_it_learns(tmp_path: Path) -> None:
    learned = lesson(tmp_path, 80_000)
    teach(learned, no_end, show)
    first, *_, last = learned.curve
    best = max(point.checked for point in learned.curve)
    assert last.steps >= 80_000
    assert best > first.checked + 0.1
    kept = Trained.load(str(learned.best))
    assert kept.card.form == "knobs"
    assert train.check(kept.layers, learned)[0] == pytest.approx(best)
    assert list((tmp_path / "tensorboard").rglob("events.out.tfevents*"))


@pytest.mark.usefixtures("small")
def test_it_goes_on_where_it_was_interrupted(tmp_path: Path) -> None:
    calls = iter(range(10**9))

    def interrupt(steps: int, text: str) -> None:
        if next(calls) == 6:
            raise KeyboardInterrupt

    learned = lesson(tmp_path, 24_000)
    with pytest.raises(KeyboardInterrupt):
        teach(learned, no_end, interrupt)
    before = learned.curve
    assert [point.steps for point in before] == [8192]
    with (learned.folder / "curve.jsonl").open("ab") as file:
        file.write(b'{"steps": 99')  # as a kill leaves it
    teach(learned, no_end, show)
    steps = [point.steps for point in learned.curve]
    assert steps[0] == 8192 and steps[1] > 8192 and steps[-1] >= 24_000 and steps == sorted(steps)
    teach(learned, no_end, show)
    assert [point.steps for point in learned.curve] == steps, "it was done"


@pytest.mark.usefixtures("small")
def test_it_ends_in_time_and_the_network_that_comes_out_is_the_trained_one(tmp_path: Path) -> None:
    left = iter([1.0] * 200 + [0.0] * 10**6)
    learned = lesson(tmp_path, 10**9)
    teach(learned, lambda: next(left), show)
    assert 0 < learned.curve[-1].steps < 5000
    model = PPO.load(learned.folder / "checkpoint.zip", device="cpu")
    observations = np.random.default_rng(0).uniform(-1, 1, (50, 30)).astype(np.float32)
    actions = Trained("x", layers_of(model), Trained.load(str(learned.best)).card).act(observations)
    expected, _ = model.predict(observations, deterministic=True)
    np.testing.assert_allclose(np.clip(actions, -1, 1), expected, atol=1e-5)


def train_command(out: Path, *more: str) -> int:
    flags = ("--traces", "uniform:50-400,5-40", "--slo", "tbt:40", "--seeds", "2", "--steps", "3000")
    return run.main(["train", *flags, "--processes", "1", "--out", str(out), *more])


@pytest.mark.usefixtures("small")
def test_the_command_leaves_a_law_its_scores_and_a_report(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("profiles.training.SCORED_S", 5.0)
    monkeypatch.setattr("profiles.training.GRID", (512,))
    out = tmp_path / "mine"
    assert train_command(out) == 0
    law = Trained.load(str(out / "mine.npz"))
    assert law.card.scores["clairvoyant"] == 1.0
    assert law.card.scores.keys() == {"rl", "pid", "predictive", "clairvoyant", "oracle static"}
    assert law.card.provenance["traces"].keys() == {"uniform:50-400,5-40"}
    assert law.card.provenance["traces"] != law.card.provenance["validation"]
    page = (out / "report.html").read_text()
    assert "Budget against context" in page and "seed-1" in page and "<script src" not in page
    assert str(out / "mine.npz") in capsys.readouterr().out.replace("\n", "")
    assert train_command(out, "--slo", "tbt:50") == 2
    assert "choose another --out" in capsys.readouterr().err


def test_without_the_extra_it_says_what_to_install(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "stable_baselines3", None)
    monkeypatch.delitem(sys.modules, "policies.train")
    assert train_command(tmp_path / "x") == 2
    assert "pip install 'pacer[train]'" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("flags", "message"),
    [(("--steps", "0"), "--steps is 0"), (("--minutes", "-1"), "--minutes"), (("--traces", "nobody"), "nobody")],
)
def test_wrong_flags_are_refused(
    tmp_path: Path, flags: tuple[str, ...], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert train_command(tmp_path / "x", *flags) == 2
    assert message in capsys.readouterr().err


def test_shares_are_geometric_means_where_there_is_something_to_share() -> None:
    found = shares({"rl": [1.0, 2.0, 0.0], "clairvoyant": [2.0, 1.0, 0.0]})
    assert found == pytest.approx({"rl": 1.0, "clairvoyant": 1.0})
