"""Slack: worked by hand, against what an engine and a simulated run really did, and as the SLO judges it."""

import math

import numpy as np
import pytest
from plant import Loop
from test_peers import SECOND_NS, completion, telemetry

from engine.config import EngineConfig
from engine.protocol import Finished, Telemetry
from envs.outcome import Outcome
from envs.simulator import Plant, Simulation
from envs.slo import Slo
from envs.step_time import StepTimeModel
from envs.trace import make_workload
from policies.catalogue import parse_law
from policies.slack import Kind, Slacks
from profiles.capacity import Trial
from profiles.tune_space import guess_budget

STEP_TIME = StepTimeModel.from_formula((20e-3, 5e-5, 2e-7), (10e-3, 25e-5, 2e-7, 5e-9, 1.5e-3)).with_noise(0.04)
LENGTHS = "lognormal:250/0.8/1500,30/0.7/200"


def test_a_deadline_gathers_slack_from_an_early_first_token() -> None:
    slacks = Slacks("deadline", bound_s=0.1, ttft_slo_s=6.0)
    assert slacks.least_s(0, 1) == math.inf
    slacks.update(telemetry(completed=(completion(10 * SECOND_NS, ttft={1: 2.0}),)))
    assert slacks.least_s(10 * SECOND_NS, 1) == pytest.approx(4 + 0.1), "arrival at 8 s, first token due at 14 s"
    slacks.update(telemetry(completed=(completion(11 * SECOND_NS, tbt={1: 1.0}, ttft={2: 8.0}),)))
    assert slacks.least_s(11 * SECOND_NS, 1) == pytest.approx(0.1), "slot 2 was late; slot 1 is due at 14.2 s"
    slacks.update(telemetry(completed=(completion(12 * SECOND_NS, tbt={1: 1.0}),)))
    assert slacks.least_s(12 * SECOND_NS, 1) == pytest.approx(2.3), "slot 2 got nothing: it is not running"
    assert slacks.least_s(12 * SECOND_NS, 2) == pytest.approx(-0.9)
    last = completion(13 * SECOND_NS, tbt={1: 1.0, 2: 2.0}, finished=(Finished(1, 0, 9, 9),))
    slacks.update(telemetry(completed=(last,)))
    assert slacks.least_s(13 * SECOND_NS, 1) == pytest.approx(-1.8), "preempted and back: its deadlines went on"


def test_tpot_counts_from_the_first_token_whenever_it_came() -> None:
    slacks = Slacks("tpot", bound_s=0.1, ttft_slo_s=6.0)
    slacks.update(telemetry(completed=(completion(10 * SECOND_NS, ttft={1: 2.0}),)))
    assert slacks.least_s(10 * SECOND_NS, 1) == pytest.approx(0.1)
    for i in range(1, 4):  # 60 ms a token for 100: 40 ms more each time
        slacks.update(telemetry(completed=(completion(10 * SECOND_NS + i * 60_000_000, tbt={1: 0.06}),)))
    assert slacks.least_s(10 * SECOND_NS + 180_000_000, 1) == pytest.approx(0.1 + 3 * 0.04)


def test_a_request_heard_late_has_no_slack_and_a_slot_is_used_again() -> None:
    slacks = Slacks("deadline", bound_s=0.1, ttft_slo_s=6.0)
    slacks.update(telemetry(completed=(completion(SECOND_NS, tbt={7000: 0.05}),)))
    assert slacks.least_s(SECOND_NS, 1) == pytest.approx(0.1)
    slacks.update(telemetry(completed=(completion(2 * SECOND_NS, ttft={7000: 1.0}),)))
    assert slacks.least_s(2 * SECOND_NS, 1) == pytest.approx(5.1), "another request's first token"
    one_token = completion(3 * SECOND_NS, ttft={3: 1.0}, finished=(Finished(3, 0, 9, 1),))
    slacks.update(telemetry(completed=(one_token,)))
    assert slacks.least_s(3 * SECOND_NS, 1) == math.inf, "it has no next token"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("tbt", 0.1, 0.0), "'tbt'"),
        (("tpot", 0.0, 0.0), "bound_s is 0"),
        (("deadline", math.nan, 0.0), "bound_s is nan"),
        (("deadline", 0.1, -1.0), "ttft_slo_s is -1"),
    ],
)
def test_bad_input_is_named(arguments: tuple[Kind, float, float], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Slacks(*arguments)


def test_it_is_that_of_the_batch_that_runs() -> None:
    """Against token times kept one by one, through preemptions: the decodes of batch N are known when it ends."""
    loop = Loop(None, 0.1, EngineConfig(budget_tokens=256, chunk_tokens=256, kv_blocks=300))
    loop.run_saturated(30)
    slacks = Slacks("deadline", 0.1, 0.5)
    base_s: dict[int, float] = {}
    outputs: dict[int, int] = {}
    checked = 0
    published = loop.link.published
    for before, message, after in zip(published, published[1:], published[2:], strict=False):
        slacks.update(message)
        for done in message.completed:
            for slot in done.tbt_slots:
                outputs[slot] += 1
            for slot, ttft_s in zip(done.ttft_slots, done.ttft_s, strict=True):
                base_s[slot] = done.completed_ns * 1e-9 - ttft_s + max(ttft_s, 0.5)
                outputs[slot] = 1
        if message.batch.prefill_tokens or before.preemptions != message.preemptions or not after.completed:
            continue  # in a batch of decodes alone, those who get a token are those who decode
        running = after.completed[0].tbt_slots
        assert len(running) == message.batch.decode_tokens
        expected_s = min(base_s[slot] + outputs[slot] * 0.1 for slot in running) - message.scheduled_ns * 1e-9
        assert slacks.least_s(message.scheduled_ns, 1) == pytest.approx(expected_s, abs=1e-5)
        checked += 1
    assert loop.core.scheduler.preemptions > 2
    assert checked > 20


def run_alone(slacks: Slacks) -> tuple[Outcome, int]:
    """One request after another on a plant with one seat; and how many tokens came when no slack was left."""
    plant = Plant(EngineConfig(max_requests=1), STEP_TIME)
    simulation = Simulation(plant, make_workload("poisson:1", LENGTHS, np.random.default_rng(3), 40))
    late = 0

    def decide(telemetry: Telemetry, now_ns: int) -> None:
        nonlocal late
        for done in telemetry.completed:
            late += len(done.tbt_slots) and slacks.least_s(done.completed_ns, 1) < -2e-9  # of telemetry's clock
        slacks.update(telemetry)

    simulation.run_law(decide)
    return simulation.outcome(), late


def test_a_token_without_slack_is_late_as_the_slo_judges_it() -> None:
    bound_s = 0.02  # a decode alone takes 20.05 ms with 4 % of noise
    outcome, late = run_alone(Slacks("deadline", bound_s, 0.05))
    assert late == outcome.late(Slo(deadline_s=bound_s, ttft_s=0.05)).sum()
    assert 0.02 < late / len(outcome.token_times_s) < 0.98
    outcome, late = run_alone(Slacks("tpot", bound_s, 0.05))
    assert late == outcome.late(Slo(deadline_s=bound_s)).sum()
    assert 0.02 < late / len(outcome.token_times_s) < 0.98


@pytest.mark.parametrize("promise", ["tpot:40", "deadline:40 ttft:2000"])
def test_a_law_that_knows_gaps_alone_aims_at_what_keeps_the_promise(promise: str) -> None:
    assert parse_law("pid", Slo.parse(promise)).tbt_slo_s == 0.04
    plant = Plant(EngineConfig(), STEP_TIME)
    workload = make_workload("poisson:1", LENGTHS, np.random.default_rng(0), 50, plant.config.max_model_tokens)
    assert guess_budget(plant, workload, Slo.parse(promise)) == guess_budget(plant, workload, Slo(tbt_s=0.04)) < 512


def test_a_law_that_spends_slack_serves_more_under_a_deadline_than_any_static_budget() -> None:
    plant = Plant(EngineConfig(), STEP_TIME, reserve_output=True)
    workload = make_workload("poisson:1", LENGTHS, np.random.default_rng(0), 250, plant.config.max_model_tokens)
    slo = Slo.parse("deadline:60 ttft:4000 quantile:0.9")
    statics = [Trial(plant, workload, slo, 0, f"static:budget={b}").capacity() for b in (64, 128, 192, 256, 512, 1024)]
    assert Trial(plant, workload, slo, 0, "qoserve").capacity() > max(statics) > 0
