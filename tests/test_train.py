"""Training: what scenarios are drawn, that PPO learns from them, that it can be interrupted, and what comes out."""

import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from gymnasium.vector import AutoresetMode
from stable_baselines3 import PPO

import run
from engine.config import EngineConfig
from engine.protocol import Telemetry
from envs.arrivals import gamma_arrivals
from envs.codec import CODEC_VERSION
from envs.serving_env import Episodes
from envs.serving_vector_env import ServingVectorEnv
from envs.simulator import Plant, Simulation
from envs.slo import Slo
from envs.step_time import StepTimeModel
from envs.trace import Lengths, Workload, make_workload
from policies import train
from policies.rl import Trained
from policies.scenarios import FEWEST, MOST, Scenarios, fluid_capacity
from policies.train import Lesson, SideBySide, layers_of, teach
from profiles.capacity import CLAIRVOYANT, Trial
from profiles.record import Recording
from profiles.training import Asked, capacities_of, capacity, fitted, parted, shares

MODEL = StepTimeModel.from_formula((4.7e-3, 7.3e-6, 35e-9), (1.3e-3, 20.9e-6, 45.5e-9, 1.045e-9, 0.28e-3))
CONFIG = EngineConfig(max_requests=64, max_budget_tokens=2048, max_model_tokens=4096, kv_blocks=20_000)
SLO = Slo(tbt_s=0.02)
SHORT = Lengths(np.arange(50, 400), np.arange(400, 50, -1) // 10)
LONG = Lengths(np.arange(1000, 3000), np.arange(1000, 3000) // 50)


def no_clock() -> float:
    return 0.0


def show(steps: int, text: str) -> None:
    pass


def scenarios(seed: int = 0) -> Scenarios:
    return Scenarios(MODEL, CONFIG, [SHORT, LONG], SLO, seed)


def test_scenarios_are_drawn_far_and_wide_and_again_from_the_same_seed() -> None:
    source = scenarios()
    drawn = [source(np.random.default_rng(seed)) for seed in range(200)]
    slos = np.array([scenario.slo.tbt_s for scenario in drawn])
    assert 0.02 / 3 <= slos.min() < 0.01 and 0.04 < slos.max() <= 0.06
    pipelines = {(s.plant.config.pipeline_parallel, s.plant.dead_time_iterations) for s in drawn}
    assert pipelines == {(stages, 1 + n) for stages in (1, 2, 4) for n in range(2 + stages)}
    assert all(FEWEST <= len(scenario.workload) <= MOST for scenario in drawn)
    batch = (20, 20_000, 1, 300, 45_000.0)
    for stages in (1, 2, 4):
        of_stage = [s.plant.step_time.mean_s(*batch) for s in drawn if s.plant.config.pipeline_parallel == stages]
        assert 0.7 < np.median(of_stage) * stages / MODEL.mean_s(*batch) < 1.4
    errors = np.array([s.step_time.mean_s(*batch) / s.plant.step_time.mean_s(*batch) for s in drawn if s.step_time])
    assert 0.2 < np.mean(errors == 1.0) < 0.6
    assert errors.min() < 0.8 and errors.max() > 1.25
    noise = [scenario.plant.step_time.factor(0.99, mixed=True) for scenario in drawn]
    assert min(noise) < 1.05 and 1.2 < max(noise) < 1.3
    again = scenarios()(np.random.default_rng(7))
    assert again.workload.arrival_s.tobytes() == drawn[7].workload.arrival_s.tobytes()
    assert again.plant.step_time.coefficients.tobytes() == drawn[7].plant.step_time.coefficients.tobytes()


@pytest.mark.parametrize(
    ("slo", "message"),
    [
        (Slo(ttft_s=1.0), "add tbt"),
        (Slo(tbt_s=1e-4), "too short"),
        (Slo(tbt_s=0.02, tpot_s=0.01), "leave out the rest"),
        (Slo(tbt_s=0.02, e2el_s=5.0), "leave out the rest"),
    ],
)
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


def test_two_stages_carry_as_much_as_one_device_that_computes_what_both_do_at_once() -> None:
    half, seats = MODEL.scaled(0.5), 2 * CONFIG.max_requests
    pipeline = fluid_capacity(half, SHORT, 0.02, replace(CONFIG, pipeline_parallel=2, max_requests=seats))
    assert pipeline == pytest.approx(fluid_capacity(half, SHORT, 0.01, CONFIG), rel=1e-4)


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
    return Lesson("limit", scenarios(0), scenarios(1), steps, 0, folder / "seed-0")


@pytest.mark.usefixtures("small")
def test_it_learns(tmp_path: Path) -> None:
    learned = lesson(tmp_path, 80_000)
    env = SideBySide(
        ServingVectorEnv(learned.taught, train.N_ENVS, Episodes(), AutoresetMode.SAME_STEP, "limit"), seed=0
    )
    untaught, _ = train.check(layers_of(train._new(learned, env)), learned)
    teach(learned, no_clock, np.inf, show)
    best = max(point.checked for point in learned.curve)
    assert learned.curve[-1].steps >= 80_000
    assert best > untaught + 0.1
    kept = Trained.load(str(learned.best))
    assert kept.card.form == "limit"
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
        teach(learned, no_clock, np.inf, interrupt)
    assert [point.steps for point in learned.curve] == [8192]
    kept = PPO.load(learned.checkpoint, device="cpu")
    assert kept.num_timesteps == 6 * 2048, "of seven rollouts, the last was not learned from yet"
    assert kept._n_updates == 6 * train.EPOCHS
    teach(learned, no_clock, np.inf, show)
    steps = [point.steps for point in learned.curve]
    assert steps[0] == 8192 and steps[1] > 8192 and steps[-1] >= 24_000 and steps == sorted(steps)
    teach(learned, no_clock, np.inf, show)
    assert [point.steps for point in learned.curve] == steps, "it was done"


@pytest.mark.usefixtures("small")
def test_it_ends_in_time_and_the_network_that_comes_out_is_the_trained_one(tmp_path: Path) -> None:
    seconds = iter(range(10**6))
    learned = lesson(tmp_path, 10**9)
    teach(learned, lambda: next(seconds), 200, show)
    assert 0 < learned.curve[-1].steps < 5000
    assert 200 <= learned.seconds < 210
    teach(learned, lambda: next(seconds), 200, show)
    assert len(learned.curve) == 1, "its time was spent"
    model = PPO.load(learned.folder / "checkpoint.zip", device="cpu")
    observations = np.random.default_rng(0).uniform(-1, 1, (50, 30)).astype(np.float32)
    actions = Trained("x", layers_of(model), Trained.load(str(learned.best)).card).act(observations)
    expected, _ = model.predict(observations, deterministic=True)
    np.testing.assert_allclose(np.clip(actions, -1, 1), expected, atol=1e-5)


@pytest.mark.usefixtures("small")
def test_what_has_learned_from_no_rollout_is_no_law(tmp_path: Path) -> None:
    seconds = iter(range(10**6))
    learned = lesson(tmp_path, 10**9)
    teach(learned, lambda: next(seconds), 100, show)  # of 128 steps
    assert learned.curve == [] and not learned.best.exists()


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
    assert law.card.provenance["validation"].keys() == {"uniform:50-400,5-40, kept back"}
    assert law.card.stages == 4
    page = (out / "report.html").read_text()
    assert "Budget against context" in page and "seed-1" in page and "<script src" not in page
    assert str(out / "mine.npz") in capsys.readouterr().out.replace("\n", "")
    assert train_command(out, "--slo", "tbt:50") == 2
    assert "choose another --out" in capsys.readouterr().err
    monkeypatch.setattr("profiles.training.CODEC_VERSION", CODEC_VERSION + 1)
    assert train_command(out) == 2
    assert "choose another --out" in capsys.readouterr().err


def test_without_the_extra_it_says_what_to_install(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "stable_baselines3", None)
    monkeypatch.delitem(sys.modules, "policies.train")
    assert train_command(tmp_path / "x") == 2
    assert "pip install 'pacer[train]'" in capsys.readouterr().err
    assert not (tmp_path / "x").exists(), "so that the next command may ask for something else"


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("--steps", "0"), "--steps is 0"),
        (("--minutes", "-1"), "--minutes"),
        (("--processes", "-1"), "--processes is -1"),
        (("--traces", "nobody"), "nobody"),
        (("--traces", "fixed:50,5"), "name --validation"),
        (("--slo", "tbt:40 tpot:20"), "leave out the rest"),
        (("--slo", "tbt:0.01"), "too short for this machine"),
    ],
)
def test_wrong_flags_are_refused(
    tmp_path: Path, flags: tuple[str, ...], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert train_command(tmp_path / "x", *flags) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "x").exists()


@pytest.mark.parametrize("out", ["a,b", "a@b", "."])
def test_a_folder_that_no_law_can_be_called_by_is_refused(out: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert train_command(Path(out)) == 2
    assert "the law is called by it" in capsys.readouterr().err


def recorded(folder: Path, slowness: float = 1.0, stages: int = 1) -> Path:
    config = replace(CONFIG, budget_tokens=512, chunk_tokens=512, pipeline_parallel=stages)
    workload = make_workload("poisson:8", "lognormal:300/0.8/2000,40/0.8/200", np.random.default_rng(0), 100, 4096)
    recording, knobs = Recording(folder), np.random.default_rng(0)

    def decide(telemetry: Telemetry, now_ns: int) -> tuple[int, int, str]:
        recording.take(telemetry)
        return int(knobs.integers(64, 1024)), 1024, ""

    Simulation(Plant(config, MODEL.scaled(slowness / stages)), workload).run_law(decide)
    recording.close()
    return folder


@pytest.mark.usefixtures("small")
def test_a_refused_command_leaves_the_profile_of_the_training_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("profiles.training.learn", lambda *asked: None)
    out = tmp_path / "mine"
    assert train_command(out, "--profile", str(recorded(tmp_path / "a"))) == 2
    assert "before anything was learned" in capsys.readouterr().err
    before = (out / "profile.json").read_bytes()
    assert train_command(out, "--profile", str(recorded(tmp_path / "b", slowness=2.0))) == 2
    assert "choose another --out" in capsys.readouterr().err
    assert (out / "profile.json").read_bytes() == before
    model, batch = StepTimeModel.load(out / "profile.json"), (8, 4000, 1, 256, 256 * 128.0)
    assert model.mean_s(*batch) == pytest.approx(MODEL.mean_s(*batch), rel=0.05)


def test_recordings_that_tell_too_little_or_of_a_pipeline_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="is of a pipeline of 2 stages: record an engine of one"):
        fitted(recorded(tmp_path / "two", stages=2))
    old = recorded(tmp_path / "old")
    for part in (old / "iterations.parquet").glob("*.parquet"):
        table = pq.read_table(part)
        pq.write_table(table.replace_schema_metadata({"bounds": b'{"max_budget_tokens":2048}', "stages": b"1"}), part)
    with pytest.raises(ValueError, match=r"min_budget_tokens.*record again"):
        fitted(old)


def test_what_is_kept_back_is_not_trained_on() -> None:
    rng = np.random.default_rng(1)
    most, rest = parted(Lengths(rng.integers(1, 40, 5000), rng.integers(1, 20, 5000)))
    assert len(most) + len(rest) == 5000 and 800 < len(rest) < 1200
    assert not set(zip(most.prompt_tokens, most.output_tokens, strict=True)) & set(
        zip(rest.prompt_tokens, rest.output_tokens, strict=True)
    )


def test_laws_are_scored_at_several_promises_where_the_server_can_be_loaded() -> None:
    rng = np.random.default_rng(0)
    asked = Asked(Plant(CONFIG, MODEL), {}, {"short": SHORT}, Slo(tbt_s=0.02, ttft_s=1.0), {})
    trials = asked.trials("static:budget=256")
    assert [str(trial.slo) for trial in trials] == ["tbt:20 ttft:1000", "tbt:10", "tbt:20", "tbt:40"]
    one = Workload(np.arange(2.0), rng.integers(50, 60, 2), np.array([2, 2]))
    assert capacity(replace(trials[0], load=one)) == np.inf
    capacities = capacities_of([replace(trial, load=one) for trial in trials], 1)
    assert shares(capacities) == {}


def test_shares_are_geometric_means_where_there_is_something_to_share() -> None:
    found = shares({"rl": [1.0, 2.0, 0.0], "clairvoyant": [2.0, 1.0, 0.0]})
    assert found == pytest.approx({"rl": 1.0, "clairvoyant": 1.0})
    assert shares({"rl": [0.0], "clairvoyant": [0.0]}) == {}
