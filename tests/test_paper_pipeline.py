"""The paper's pipeline experiment, without its GPUs: what it plans, how it judges, and its loop on a modelled pipeline.

The runs on real ranks are the command's own rehearsal, too long for a test; one that has no time left is made here.
"""

import argparse
import json
import math
import time
from collections import deque
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
from plant import VirtualClock

from benchmarks import paper_pipeline
from benchmarks.paper_pipeline import Call, OutOfTime
from benchmarks.paper_plan import (
    PLACES,
    PREDICTIVE,
    PROMISES,
    Measured,
    Setting,
    promises_s,
    requests,
    search_capacities,
    settings,
)
from benchmarks.paper_verdicts import Row, judge, stage_shares, tables
from benchmarks.pipeline_ranks import Ranks
from benchmarks.pipeline_runs import ClosedLoop, figures
from engine.config import EngineConfig, ModelSource
from engine.protocol import StageTimes
from engine.request import Batch, StepResult
from engine.telemetry import compose
from envs.simulator import Plant
from envs.slo import Slo
from envs.step_time import StepTimeModel
from policies.catalogue import parse_law
from profiles.capacity import PolicySpec
from profiles.parallel import worker_pool
from profiles.sweep_points import Point

# A stage of LLaMA2-70B on TP4-PP2, by arithmetic: 17.5 GB of weights a GPU, 35 GFLOP a token over four of them.
STAGE = StepTimeModel.from_formula((6e-3, 6e-6, 12e-9), (5e-3, 37e-6, 12e-9, 0.8e-9, 0.2e-3)).with_noise(0.03)
PLACE = PLACES["cuda"]
CONFIG = replace(
    Setting("llama2-70b", 4, 2).config("cuda"), block_tokens=128, kv_blocks=15_000, name="modelled"
)  # as 2M tokens of KV cache would be settled on
DECODE_S = 2 * STAGE.mean_s(32, 32 * 4096, 0, 0, 0)
FIXED = PLACE.fixed


class ModelledPipeline:
    """A runner of two stages that take modelled time, each with noise of its own from a seed."""

    def __init__(self, model: StepTimeModel, clock: VirtualClock, noise: float = 0.03) -> None:
        self.model, self.clock, self.noise = model, clock, noise
        self.free_ns = [0, 0]
        self.in_flight: deque[InFlight] = deque()
        self.random = np.random.default_rng(0)

    def launch(self, batch: Batch) -> "InFlight":
        of = compose(batch)
        mean_s = self.model.mean_s(
            *(of.decode_tokens, of.decode_context_tokens, of.prefill_requests, of.prefill_tokens),
            of.prefill_attention_tokens2,
        )
        ready_ns, stages = self.clock(), []
        decodes = zip(batch.requests[: batch.n_decodes], batch.context.tolist(), strict=False)
        if any(context == len(request.token_ids) for request, context in decodes):  # its token is in flight
            ready_ns = max(ready_ns, self.in_flight[0].done_ns)
        for stage, free_ns in enumerate(self.free_ns):
            seconds = mean_s * float(np.exp(self.noise * self.random.standard_normal()))
            begin_ns = max(ready_ns, free_ns)
            bubble_s = max(begin_ns - max(free_ns, batch.work_since_ns), 0) * 1e-9
            self.free_ns[stage] = ready_ns = begin_ns + round(seconds * 1e9)
            stages.append(StageTimes(seconds, bubble_s, len(self.in_flight) + 1))
        outcome = StepResult([0] * int(batch.samples.sum()), mean_s, tuple(stages))
        self.in_flight.append(InFlight(self, ready_ns, outcome))
        return self.in_flight[-1]


class InFlight(NamedTuple):
    pipeline: ModelledPipeline
    done_ns: int
    outcome: StepResult
    padding_tokens: int = 0

    def result(self) -> StepResult:
        clock = self.pipeline.clock
        clock.now_ns = max(clock.now_ns, self.done_ns)
        assert self.pipeline.in_flight.popleft() is self
        return self.outcome


def live(policy: str, factor: float, at_once: int, mix: str = "arxiv") -> Row:
    """The figures of a run as the command makes it, on the modelled pipeline: 20 virtual seconds."""
    spec, clock = PolicySpec.parse(policy), VirtualClock()
    law = parse_law(spec.law, Slo(tbt_s=factor * DECODE_S), STAGE)
    config = spec.adapt(Plant(CONFIG, STAGE)).config
    loop = ClosedLoop(ModelledPipeline(STAGE, clock), config, law, requests(PLACE, mix, 200, 1), at_once, clock)
    return figures(loop.run(20.0, 25.0))


def test_the_predictive_law_drives_the_core_and_keeps_the_strict_promise_with_far_fewer_bubbles() -> None:
    law, static = live(PREDICTIVE, PROMISES["strict"], 40), live(FIXED[-1], PROMISES["strict"], 40)
    bound_s = PROMISES["strict"] * DECODE_S
    assert law["tbt_p99_s"] <= 1.05 * bound_s < static["tbt_p99_s"]  # 20 s are short for a P99 that is aimed at
    assert law["tbt_p99_s"] > 0.7 * bound_s, "it uses what the promise leaves"
    assert law["bubble_ms_per_ktoken"] < 0.22 * static["bubble_ms_per_ktoken"]
    assert law["tokens_s"] > static["tokens_s"]


@pytest.mark.parametrize("promise", ["strict", "relaxed"])
@pytest.mark.parametrize("mix", ["sharegpt", "arxiv"])
@pytest.mark.parametrize("at_once", [20, 40, 80])
def test_prompts_are_spread_over_the_microbatches_whatever_the_promise(promise: str, mix: str, at_once: int) -> None:
    law, static = (live(policy, PROMISES[promise], at_once, mix) for policy in (PREDICTIVE, FIXED[-1]))
    assert law["tbt_p99_s"] <= PROMISES[promise] * DECODE_S
    assert law["bubble_ms_per_ktoken"] < 0.22 * static["bubble_ms_per_ktoken"]
    assert law["tokens_s"] > static["tokens_s"]


def test_prefill_first_really_runs_whole_prompts_by_themselves() -> None:
    row, static = live(FIXED[0], 5.0, 40), live("static:budget=512", 5.0, 40)
    longest_s = STAGE.mean_s(0, 0, 1, 12_000, 12_000**2 / 2)
    assert row["tbt_p99_s"] > longest_s > 5 * static["tbt_p99_s"]


def test_each_shape_is_a_pipeline_first_and_has_one_promise() -> None:
    chosen = settings(["llama2-70b", "falcon-180b"], 8)
    assert [s.name for s in chosen] == [
        "llama2-70b-tp4-pp2",
        "falcon-180b-tp4-pp2",
        "llama2-70b-tp8",
        "falcon-180b-tp8",
    ]
    assert [s.layout for s in settings(["x"], 2)] == ["pp2", "tp2"]
    assert [s.layout for s in settings(["x"], 4)] == ["tp2-pp2", "tp4"]
    with pytest.raises(ValueError, match="3 GPUs do not make a pipeline"):
        settings(["x"], 3)
    plan = {"llama2-70b-tp4-pp2": Measured(CONFIG, 0.02), "llama2-70b-tp8": Measured(CONFIG, 0.01)}
    assert promises_s(plan, "llama2-70b", 8) == pytest.approx({"strict": 0.1, "relaxed": 0.5})
    with pytest.raises(ValueError, match="falcon-180b-tp4-pp2 takes"):
        promises_s(plan, "falcon-180b", 8)


@pytest.mark.parametrize("device", ["cuda", "cpu"])
def test_an_engine_can_be_asked_for_all_that_is_run_on_it(device: str) -> None:
    place = PLACES[device]
    for setting in settings(["llama2-70b"], 4):
        config = replace(setting.config(device), block_tokens=16, kv_blocks=16_384)
        assert place.decode.fits(config)
        for policy in place.policies:
            spec = PolicySpec.parse(policy)
            assert spec.adapt(Plant(config, STAGE)).config.schedule in ("stall-free", "prefill-first")
            parse_law(spec.law, Slo(tbt_s=0.1), STAGE)
    lengths = {mix: requests(place, mix, 2000, 0) for mix in place.mixes}
    scale = 1.0 if device == "cuda" else 0.1
    # Sarathi-Serve, table 2: median prompts and outputs.
    assert np.median(lengths["sharegpt"].prompt_tokens) == pytest.approx(1730 * scale, rel=0.1)
    assert np.median(lengths["arxiv"].prompt_tokens) == pytest.approx(7059 * scale, rel=0.1)
    assert np.median(lengths["arxiv"].output_tokens) == pytest.approx(208 * scale, rel=0.1)
    assert (lengths["sharegpt"].prompt_tokens + lengths["sharegpt"].output_tokens).max() <= 8192 * scale + 1


def test_capacities_are_searched_for_every_schedule_and_fix_how_many_requests_run(tmp_path: Path) -> None:
    place = PLACE._replace(mixes={"arxiv": PLACE.mixes["arxiv"]}, budgets=(512, 2048), searched=60)
    path = tmp_path / "model.json"
    STAGE.save(path)
    with worker_pool(2) as pool:
        ((name, mix),) = search_capacities(pool, path, Measured(CONFIG, DECODE_S), place, {"strict": 5 * DECODE_S}, 0)
    assert name == "arxiv"
    assert mix.capacity.keys() == {"strict"}
    of = mix.capacity["strict"]
    assert list(of) == place.policies
    assert of["static:budget=512"] > 2 * of["static:budget=2048"], "which breaks the promise in company"
    assert 1.0 < of[PREDICTIVE] < 6.0
    assert 4 < mix.at_once["strict"] < 256


def rows_of(policies: dict[str, tuple[float, float, float, float]], **changes: Any) -> list[Row]:
    """Runs by policy: (capacity, requests a second, P99 TBT in s, bubbles in ms a 1000 tokens)."""
    base = {"shape": "s", "layout": "tp4-pp2", "stages": 2, "mix": "arxiv", "promise": "strict", "promise_s": 0.1}
    more = {"at_once": 9, "busy_s": [3.0, 1.0], "bubble_s": [1.0, 1.0], "tbt_p50_s": 0.01, "ttft_p50_s": 0.5}
    names = ("capacity", "requests_s", "tbt_p99_s", "bubble_ms_per_ktoken")
    return [
        {**base, **more, "ttft_p99_s": None, "policy": policy, **dict(zip(names, values, strict=True)), **changes}
        for policy, values in policies.items()
    ]


GOOD = {
    PREDICTIVE: (2.2, 2.1, 0.09, 4.0),
    FIXED[0]: (0.5, 2.5, 0.80, 30.0),
    FIXED[1]: (2.0, 2.0, 0.05, 3.0),
    FIXED[2]: (1.0, 2.2, 0.15, 8.0),
    FIXED[3]: (0.8, 2.3, 0.20, 10.0),
}


def test_predictive_is_judged_against_the_best_that_kept_the_promise_and_the_largest_budgets_bubbles() -> None:
    (verdict,) = judge(rows_of(GOOD), FIXED)
    assert verdict.of_best_capacity == pytest.approx(1.1)
    assert verdict.of_best_live == pytest.approx(1.05), "others were faster and broke the promise"
    assert verdict.bubbles_cut == pytest.approx(0.6)
    assert verdict.ok


@pytest.mark.parametrize(
    ("changed", "law"),
    [
        ("promise", (2.2, 2.1, 0.101, 4.0)),
        ("bubbles", (2.2, 2.1, 0.09, 4.6)),
        ("capacity", (1.9, 2.1, 0.09, 4.0)),
        ("live", (2.2, 1.9, 0.09, 4.0)),
        ("no tokens", (2.2, 2.1, None, 4.0)),
    ],
)
def test_each_part_of_the_goal_counts(changed: str, law: Any) -> None:
    (verdict,) = judge(rows_of(GOOD | {PREDICTIVE: law}), FIXED)
    assert not verdict.ok, changed


def test_a_pipeline_is_judged_when_all_its_runs_are_there_and_tensor_parallel_never() -> None:
    rows = rows_of(GOOD)
    assert not list(judge(rows[:-1], FIXED))
    assert not list(judge(rows_of(GOOD, stages=1, layout="tp8"), FIXED))
    broken = {policy: (*values[:2], 0.5, values[3]) for policy, values in GOOD.items() if policy != PREDICTIVE}
    (verdict,) = judge(rows_of({PREDICTIVE: GOOD[PREDICTIVE], **broken}), FIXED)
    assert verdict.of_best_live is None
    assert verdict.ok
    assert stage_shares(rows[0]) == [0.25, 0.5]
    (table,) = tables([*rows, *rows_of(GOOD, stages=1, layout="tp8")])
    assert table.row_count == 10


def asked(tmp_path: Path, **changes: Any) -> argparse.Namespace:
    known: dict[str, Any] = {"device": "cpu", "gpus": 2, "promises": ["strict"], "mixes": ["arxiv"], "minutes": 1.0}
    known |= {"sweep": 1.0, "warm_up": 1.0, "seconds": 1.0, "processes": 1, "seed": 0, "out": tmp_path}
    return argparse.Namespace(**known | changes)


def test_a_call_without_time_loads_nothing_and_one_that_is_complete_neither(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def load(*_: object) -> Ranks:
        raise AssertionError("ranks were loaded")

    monkeypatch.setattr(paper_pipeline, "Ranks", load)
    setting = settings(["pacer-26m"], 2)[0]
    call = Call(asked(tmp_path), time.monotonic() + PLACES["cpu"].loading_s)
    policies = PLACES["cpu"].policies
    assert call.missing(setting) == [("strict", "arxiv", policy) for policy in policies]
    with pytest.raises(OutOfTime):
        call.make(setting)
    rows = [{"key": f"{setting.name} strict arxiv {policy}"} for policy in policies]
    (tmp_path / "runs.json").write_text(json.dumps(rows))
    Call(asked(tmp_path), -math.inf).make(setting)


def test_runs_on_real_ranks_are_kept_and_gone_on_with(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One engine process with one stage: what differs with several is in test_parallel."""
    setting = Setting("pacer-26m", 1, 1)
    args = asked(tmp_path, seconds=2.0)
    # A sweep takes its time, and has tests of its own. This model is so slow that few requests load it.
    measured = StepTimeModel.from_formula((8e-2, 1e-3, 1e-8), (8e-2, 2e-2, 1e-8, 2e-8, 1e-4))
    measured.save(tmp_path / f"{setting.name}.json")
    place = PLACES["cpu"]._replace(
        mixes={"arxiv": "uniform:20-60,4-12"}, budgets=(16, 32), longest=256, searched=40, max_requests=16
    )
    monkeypatch.setitem(PLACES, "cpu", place._replace(decode=Point(8, 40)))
    monkeypatch.setattr(paper_pipeline, "promises_s", of_own)
    begun: list[str] = []
    allow: Callable[..., None] = lambda self, seconds: begun.append("") if len(begun) < 2 else stop()  # noqa: E731
    monkeypatch.setattr(Call, "_require", allow)
    with pytest.raises(OutOfTime):
        Call(args, 0.0).make(setting)
    call = Call(args, 0.0)
    assert len(call.rows) == 1, "one question was for the loading"
    assert call.plan[setting.name].decode_s > 0
    assert call.rows[0]["requests_s"] > 0
    assert len(call.missing(setting)) == len(place.policies) - 1
    before = call.plan[setting.name].mixes["arxiv"]
    begun.clear()
    with pytest.raises(OutOfTime):
        call.make(setting)
    assert [row["policy"] for row in call.rows] == place.policies[:2]
    assert call.plan[setting.name].mixes["arxiv"] == before
    call.save([], 1)
    results = json.loads((tmp_path / "paper-pipeline.json").read_text())
    assert results["missing_runs"] == 1
    about = results["settings"][setting.name]
    assert about.items() >= measured.description.provenance.items()
    assert about["decode_s"] > 0


def of_own(plan: dict[str, Measured], shape: str, gpus: int) -> dict[str, float]:
    return {"strict": 5 * next(iter(plan.values())).decode_s}


def stop() -> None:
    raise OutOfTime


def test_a_batch_that_ranks_cannot_form_is_refused_by_name() -> None:
    ranks = Ranks(ModelSource(), EngineConfig(max_requests=4, kv_blocks=512))
    try:
        assert ranks.iteration_s(Point(4, 64)) > 0
        with pytest.raises(ValueError, match=r"decodes=5.* does not fit pacer"):
            ranks.iteration_s(Point(5, 64))
    finally:
        ranks.close()
