"""Trained laws: what is shipped, what is refused, and that they do live what they learned in simulation."""

import itertools
from collections.abc import Callable
from pathlib import Path

import gymnasium
import msgspec
import numpy as np
import pytest
from plant import Loop

from engine.config import EngineConfig
from engine.protocol import BatchComposition, Telemetry
from envs.codec import CODEC_VERSION, FEATURES, FORMS, N_FEATURES, Form
from envs.serving_env import Scenario, ServingEnv
from envs.simulator import Plant, Simulation
from envs.slo import Slo
from envs.state import LOG_COLUMNS
from envs.step_time import StepTimeModel
from envs.trace import make_workload
from policies.catalogue import parse_law
from policies.guard import Guard
from policies.policy import Decision
from policies.rl import FOLDER, Card, Layer, Rl, Trained

MODEL = StepTimeModel.from_formula((4.7e-3, 7.3e-6, 35e-9), (1.3e-3, 20.9e-6, 45.5e-9, 1.045e-9, 0.28e-3))
SLO = Slo(tbt_s=0.03)
PLANT = Plant(EngineConfig(max_requests=64, max_budget_tokens=4096, tile_tokens=16), MODEL.with_noise(0.04))


def network(deviation: float, seed: int = 0) -> tuple[Layer, ...]:
    """Random; with a small deviation its actions are all over."""
    rng = np.random.default_rng(seed)
    sizes = (N_FEATURES, 16, 16, 2)
    *layers, (weights, biases) = (
        (rng.normal(0, deviation, pair).astype(np.float32), rng.normal(0, deviation, pair[1]).astype(np.float32))
        for pair in itertools.pairwise(sizes)
    )
    return (*layers, (weights, np.full_like(biases, 2 * deviation)))


def saved(folder: Path, deviation: float = 0.5, form: Form = "limit", stages: int = 1) -> Trained:
    return Trained.save(folder / "own.npz", network(deviation), Card(CODEC_VERSION, FEATURES, form, stages, "", 1000))


@pytest.mark.parametrize("path", sorted(FOLDER.glob("*.npz")), ids=lambda path: path.stem)
def test_what_is_shipped_can_be_loaded_and_says_how_good_it_is(path: Path) -> None:
    law = Trained.load(path.stem)
    assert law.name == path.stem
    assert {"rl", "pid", "predictive", "clairvoyant", "oracle static"} <= law.card.scores.keys()
    assert {"profile", "traces", "validation", "versions", "seed"} <= law.card.provenance.keys()


def test_the_default_is_shipped() -> None:
    assert parse_law("rl", SLO, MODEL).tbt_slo_s == 0.03


def test_a_law_is_loaded_as_it_was_saved(tmp_path: Path) -> None:
    law, observation = saved(tmp_path), np.linspace(-1, 1, N_FEATURES, dtype=np.float32)
    (w0, b0), (w1, b1), (w2, b2) = network(0.5)
    expected = np.tanh(np.tanh(observation @ w0 + b0) @ w1 + b1) @ w2 + b2
    loaded = Trained.load(str(tmp_path / "own.npz"))
    np.testing.assert_allclose(loaded.act(observation[None])[0], expected, rtol=1e-5, atol=1e-6)
    assert law.act(np.stack([observation] * 3)).shape == (3, 2)


def other_card(folder: Path, **changes: object) -> None:
    path = folder / "own.json"
    path.write_bytes(msgspec.json.encode({**msgspec.json.decode(path.read_bytes()), **changes}))


def other_weights(folder: Path, layers: tuple[Layer, ...]) -> None:
    Trained.save(folder / "own.npz", layers, Card(CODEC_VERSION, FEATURES, "limit", 1, "", 0))


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda folder: other_card(folder, codec_version=1, features=["age"], speed=3), "codec version 1, this is"),
        (lambda folder: other_card(folder, features=[*FEATURES[1:], FEATURES[0]]), "other features, or in another"),
        (lambda folder: other_card(folder, form="speed"), r"speed.*\$\.form"),
        (lambda folder: other_card(folder, form="knobs"), "weights are not those"),
        (lambda folder: other_card(folder, stages=8), "weights are not those"),
        (lambda folder: other_card(folder, sha256="0" * 64), "weights are not those"),
        (lambda folder: (folder / "own.json").unlink(), "No such file.*own.json"),
        (lambda folder: (folder / "own.npz").write_bytes(b"PK nonsense"), "hold no law for this Pacer"),
        (lambda folder: (folder / "own.npz").unlink(), "name a .npz file"),
        (lambda folder: other_weights(folder, network(0.5)[1:]), "do not lead from 30 features"),
        (lambda folder: other_weights(folder, network(0.5)[:2]), "to 2 actions"),
        (lambda folder: other_weights(folder, ()), "do not lead"),
        (lambda folder: other_weights(folder, network(np.inf)), "finite"),
    ],
)
def test_what_does_not_fit_is_refused_before_an_engine_is_driven(
    tmp_path: Path, spoil: Callable[[Path], object], message: str
) -> None:
    saved(tmp_path)
    with pytest.raises(ValueError, match=message):
        spoil(tmp_path)
        parse_law(f"rl:name={tmp_path / 'own.npz'}", SLO, MODEL)


@pytest.mark.parametrize(
    ("spec", "slo", "model", "message"),
    [
        ("rl:name=nobody", SLO, MODEL, "limit"),
        ("rl:speed=3", SLO, MODEL, "it has name"),
        ("rl", None, MODEL, "--slo"),
        ("rl", SLO, None, "--profile"),
        ("rl", Slo(tpot_s=0.03), MODEL, "no bound on TBT, which knobs are set by: add tbt"),
        ("rl", Slo(tbt_s=0.03, deadline_s=0.02), MODEL, "know tbt, ttft and quantile; leave out the rest"),
        ("predictive", Slo(ttft_s=1.0), MODEL, "has none: add tbt"),
    ],
)
def test_the_command_line_says_what_is_missing(
    spec: str, slo: Slo | None, model: StepTimeModel | None, message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        parse_law(spec, slo, model)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("dead_time", [1, 3])
def test_a_law_does_live_what_it_learned_in_the_environment(tmp_path: Path, form: Form, dead_time: int) -> None:
    law, plant = saved(tmp_path, 0.25, form), Plant(PLANT.config, PLANT.step_time, dead_time)
    workload = make_workload("poisson:20", "uniform:10-1500,5-60", np.random.default_rng(1), 60)
    env = ServingEnv(lambda rng: Scenario(plant, workload, SLO, MODEL), form=form)
    observation, _ = env.reset(seed=3)
    learned, over = [], False
    while not over:
        observation, _, over, _, info = env.step(law.act(observation[None])[0])
        learned.append((info["budget_tokens"], info["chunk_tokens"]))
    drives, lived = parse_law(f"rl:name={tmp_path / 'own.npz'}", SLO, MODEL), []
    policies: list[Rl] = []

    def decide(telemetry: Telemetry, now_ns: int) -> Decision:
        lived.append((telemetry.knobs.budget_tokens, telemetry.knobs.chunk_tokens))
        if not policies:
            policies.append(drives.make(telemetry))  # type: ignore[arg-type]
        return policies[0].decide(telemetry)

    seed = int(gymnasium.utils.seeding.np_random(3)[0].integers(2**31))
    Simulation(plant, workload, seed).run_law(decide)
    assert lived[1:] == learned
    assert len(set(lived)) > 10


def test_an_action_of_nothing_fills_the_promise_less_a_margin_for_the_noise(tmp_path: Path) -> None:
    """The machine is a third slower than its profile says, and the noise is not the profile's."""
    saved(tmp_path, deviation=0.0)
    law = Guard(parse_law(f"rl:name={tmp_path / 'own.npz'}", SLO, MODEL.with_noise(0.02)))
    workload = make_workload("poisson:12", "uniform:200-1500,100-200", np.random.default_rng(0), 300)
    simulation = Simulation(Plant(PLANT.config, MODEL.scaled(1.33).with_noise(0.06)), workload, keep_log=True)
    simulation.run_law(law.decide)
    outcome = simulation.outcome()
    assert 0.024 < np.quantile(outcome.tbt_s, 0.99) <= 0.03
    busy = outcome.log[:, LOG_COLUMNS.index("waiting_requests")] > 0
    assert np.median(outcome.log[busy, LOG_COLUMNS.index("budget_tokens")]) > 500


@pytest.mark.parametrize("idle", [False, True])
def test_it_goes_on_from_what_guard_sent_instead(tmp_path: Path, idle: bool) -> None:
    """Where nothing runs, the answer acts on all iterations to come."""
    saved(tmp_path)
    law = Rl.FILES["name"](str(tmp_path / "own.npz"))
    loop = Loop(None)
    loop.submit("a", 100, 5)
    first = msgspec.structs.replace(loop.step(), dead_time_iterations=3)
    if idle:
        first = msgspec.structs.replace(first, batch=BatchComposition())
    rl = Rl(first, SLO, MODEL, law)
    decided = rl.decide(first)
    before = list(decided[:2] if idle else (first.knobs.budget_tokens, first.knobs.chunk_tokens))
    assert rl._codec.under_way.tolist() == [before, list(decided[:2])]
    rl.track(Decision(64, 32, "slew"))
    assert rl._codec.under_way.tolist() == [[64, 32] if idle else before, [64, 32]]


def test_a_law_drives_no_longer_pipeline_than_it_was_trained_in(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    config = EngineConfig(max_requests=64, max_budget_tokens=4096, pipeline_parallel=2)
    workload = make_workload("poisson:20", "uniform:10-1500,5-60", np.random.default_rng(1), 60)
    told = {}
    for stages in (1, 2):
        saved(tmp_path, stages=stages)
        guard, answers = Guard(parse_law(f"rl:name={tmp_path / 'own.npz'}", SLO, MODEL.scaled(0.5))), []
        Simulation(Plant(config, MODEL.scaled(0.5)), workload).run_law(
            lambda t, n, guard=guard, answers=answers: answers.append(guard.decide(t, n)) or answers[-1]
        )
        told[stages] = sum(answer is not None for answer in answers)
    assert told[1] < 5  # then silence: the engine goes on under its own knobs
    assert told[2] > 50
    assert "pipeline has 2 stages, and the law 'own' was trained for 1 at most: run predictive" in caplog.text


def test_weights_of_another_memory_layout_decide(tmp_path: Path) -> None:
    layers = tuple((np.asfortranarray(weights), biases) for weights, biases in network(0.5))
    Trained.save(tmp_path / "own.npz", layers, Card(CODEC_VERSION, FEATURES, "limit", 1, "", 0))
    heard = Loop(None).step()
    assert parse_law(f"rl:name={tmp_path / 'own.npz'}", SLO, MODEL).make(heard).decide(heard).budget_tokens > 0


def test_a_law_that_is_written_over_is_whole_at_any_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = saved(tmp_path)

    def killed(path: Path, data: bytes) -> int:
        with path.open("wb") as file:
            file.write(data[:10])
        raise KeyboardInterrupt

    monkeypatch.setattr(Path, "write_bytes", killed)
    with pytest.raises(KeyboardInterrupt):
        saved(tmp_path, 0.1)
    assert Trained.load(str(tmp_path / "own.npz")).card == before.card


def test_the_shipped_law_keeps_a_promise_on_a_real_loop() -> None:
    loop = Loop("rl", tbt_slo_s=0.1, config=EngineConfig(max_budget_tokens=2048), noise=0.03)
    loop.run_saturated(40)
    assert loop.tbt_p99_s(since_s=5) <= 0.1
    assert np.mean(loop.budgets[-200:]) > 300  # of 594 that fit
