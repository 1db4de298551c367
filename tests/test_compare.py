"""The comparison: who is in it, what its figures are, and how it goes on after an interruption."""

import html
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import psutil
import pytest
from test_capacity import LENGTHS, PLANT, trial

from envs.slo import Slo
from envs.step_time import Range, StepTimeModel
from envs.trace import make_workload
from profiles import compare as module
from profiles.capacity import TOLERANCE
from profiles.compare import Job, Question, compare, present
from profiles.report import broken_figures, write_report
from profiles.results import BEST_STATIC, BINS, FIGURES, ORACLE_STATIC, Comparison, histogram

ROOT = Path(__file__).parent.parent
POLICIES = ("pid", "static:budget=512", "static:budget=128@chunks-only", "clairvoyant")


def question(**changes: Any) -> Question:
    workloads = {
        seed: make_workload("poisson:1", LENGTHS, np.random.default_rng(seed), 150, PLANT.config.max_model_tokens)
        for seed in (0, 1)
    }
    given = {"policies": POLICIES, "grid": (64, 128, 512, 9999), "rates": (1.0, 6.0)} | changes
    return Question("small", PLANT, workloads, Slo.parse("tbt:100"), **given)


@pytest.fixture(scope="module")
def comparison(tmp_path_factory: pytest.TempPathFactory) -> Comparison:
    return compare(question(), tmp_path_factory.mktemp("compare"), processes=2)


def test_every_policy_and_the_static_baselines_have_a_row_at_every_rate(comparison: Comparison) -> None:
    rows = list(comparison.rows())
    contenders = [*POLICIES, BEST_STATIC, ORACLE_STATIC]
    assert [(row.rate, row.contender) for row in rows] == [(rate, name) for rate in (1.0, 6.0) for name in contenders]
    assert all(list(row.figures) == comparison.figures and row.capacity and row.capacity.mean > 0 for row in rows)
    assert set(FIGURES) - set(comparison.figures) == {"tpot_p99_s", "tokens_on_time"}, "neither was promised"
    assert comparison.statics == [f"static:budget={budget}" for budget in (64, 128, 512, 2048)]


def test_the_best_static_has_the_highest_capacity_and_the_oracle_the_best_goodput(comparison: Comparison) -> None:
    capacities = {policy: np.mean(comparison.capacities[policy]) for policy in comparison.statics}
    best = comparison.capacity(BEST_STATIC)
    assert best and best.mean == max(capacities.values()) == capacities[comparison.best_static]
    for rate in comparison.rates:
        goodputs = {policy: comparison.mean(policy, rate, "goodput") for policy in comparison.statics}
        assert goodputs[comparison.policy_of(ORACLE_STATIC, rate)] == max(goodputs.values())


def test_figures_are_those_of_the_run(comparison: Comparison) -> None:
    asked = question()
    outcome = asked.trial("pid", 1).simulate(6.0)
    (run,) = (run for run in comparison.of("pid", 6.0) if run.seed == 1)
    assert outcome.finished.all()
    assert run.figures["ttft_p99_s"] == np.quantile(outcome.ttft_s, 0.99)
    assert run.figures["tbt_p50_s"] == np.median(outcome.tbt_s)
    assert run.figures["goodput"] == pytest.approx(outcome.goodput(asked.slo))
    assert run.figures["tokens_in_slo"] == outcome.tokens_in_slo(0.1)
    assert run.figures["finished"] == 1.0
    assert sum(run.tbt_counts) == outcome.tbt_s.size


def test_the_figures_show_what_was_promised_and_what_broke(tmp_path: Path) -> None:
    slo = Slo.parse("tpot:60 deadline:60 ttft:30000")
    asked = replace(question(policies=("static:budget=512",), grid=(128,), rates=(1.0, 6.0)), slo=slo)
    compared = compare(asked, tmp_path, processes=2)
    assert "tokens_in_slo" not in compared.figures, "no bound on TBT was promised"
    outcome = asked.trial("static:budget=512", 1).simulate(6.0)
    (run,) = (run for run in compared.of("static:budget=512", 6.0) if run.seed == 1)
    assert run.figures["tpot_p99_s"] == np.quantile(outcome.tpot_s[~np.isnan(outcome.tpot_s)], 0.99)
    assert run.figures["tokens_on_time"] == 1 - outcome.late(slo).mean()
    slow, fast = (row for row in compared.rows() if row.contender == "static:budget=512")
    assert broken_figures(slow, slo) == set()
    assert broken_figures(fast, slo) == {"tpot_p99_s"}, "the first tokens came so early that hardly any token is late"
    assert broken_figures(fast, replace(slo, ttft_s=0.1)) == {"tpot_p99_s", "ttft_p99_s"}
    write_report(compared, tmp_path / "report.html")
    page = (tmp_path / "report.html").read_text()
    assert "TPOT p99" in page and "tokens on time" in page and "tokens in SLO" not in page


def test_a_capacity_is_that_of_the_trial_alone(comparison: Comparison) -> None:
    for policy in ("pid", "static:budget=64"):
        alone = [question().trial(policy, seed).capacity() for seed in (0, 1)]
        assert comparison.capacities[policy] == pytest.approx(alone, rel=TOLERANCE)


def test_the_number_of_processes_changes_nothing(comparison: Comparison, tmp_path: Path) -> None:
    assert msgspec.to_builtins(compare(question(), tmp_path, processes=1)) == msgspec.to_builtins(comparison)


def test_an_interrupted_comparison_goes_on_where_it_was(
    comparison: Comparison, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole, done = module.in_parallel, list[Job]()

    def counted(pool: Any, work: Any, tasks: list[Job]) -> Iterator[tuple[int, Any]]:
        for number, result in whole(pool, work, tasks):
            done.append(tasks[number])
            yield number, result
            if len(done) == 9:
                raise KeyboardInterrupt

    monkeypatch.setattr(module, "in_parallel", counted)
    with pytest.raises(KeyboardInterrupt):
        compare(question(), tmp_path, processes=2)
    unfinished = tmp_path / module.UNFINISHED
    with unfinished.open("ab") as file:
        file.write(b'["cut off')
    kept = unfinished.read_bytes().count(b"\n")
    assert kept == 9
    assert msgspec.to_builtins(compare(question(), tmp_path, processes=2)) == msgspec.to_builtins(comparison)
    assert len({job.key() for job in done}) == len(done)  # none was done twice
    assert not unfinished.exists()


def test_results_of_another_question_are_not_taken() -> None:
    job = Job(question().trial("pid", 0), 2.0, True)
    others = [
        Job(trial("pid", "tbt:100"), 2.0, True),  # other requests
        Job(question().trial("pid", 1), 2.0, True),
        Job(question().trial("pid", 0), 2.5, True),
        Job(question().trial("pid", 0), 2.0, False),
        Job(question().trial("aimd", 0), 2.0, True),
    ]
    assert job.key() == Job(question().trial("pid", 0), 2.0, True).key()
    assert len({job.key(), *(other.key() for other in others)}) == 1 + len(others)


def test_a_request_unfinished_after_the_grace_is_a_miss(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "GRACE_S", 2.0)
    run = Job(question().trial("static:budget=64", 0), 1000.0, True).do()
    assert 0 < run.figures["finished"] < 1
    assert run.figures["ttft_p99_s"] == pytest.approx(2.0, abs=0.2)  # of those without a first token, the wait so far
    assert sum(run.ttft_counts) == 150


def test_histograms_count_what_lies_between_the_bins() -> None:
    values_s = np.concatenate([np.random.default_rng(0).lognormal(-3, 3, 10_000), [0.0, 1e-4, 5e3]])
    assert histogram(values_s) == np.histogram(np.minimum(values_s, BINS[-1]), BINS)[0].tolist()


def test_what_lies_outside_the_profile_is_said(
    comparison: Comparison, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert comparison.beyond_profile == "", "a formula knows no range"
    anything, description = (0.0, 1e12), PLANT.step_time.description
    measured = Range(anything, anything, anything, prefill_tokens=(1.0, 64.0), prefill_attention_tokens2=anything)
    mixed = msgspec.structs.replace(description.mixed, measured=measured)
    plant = replace(PLANT, step_time=StepTimeModel(msgspec.structs.replace(description, mixed=mixed)))
    asked = replace(question(policies=("static:budget=64",), grid=(64, 512), rates=(2.0,)), plant=plant)
    found = compare(asked, tmp_path, processes=1)
    present(found, tmp_path)
    outside = {run.policy: run.outside for run in found.runs}
    assert outside["static:budget=64"] == 0 < outside["static:budget=512"]
    runs = found.of("static:budget=512", 2.0)
    share = sum(run.outside for run in runs) / sum(run.iterations for run in runs)
    assert f"({share:.1%} under static:budget=512) lie outside" in found.beyond_profile
    assert found.beyond_profile in capsys.readouterr().out
    assert found.beyond_profile in json.loads((tmp_path / "comparison.json").read_bytes())["beyond_profile"]
    assert html.escape(found.beyond_profile) in (tmp_path / "report.html").read_text()


def test_a_static_budget_that_was_named_is_in_the_grid() -> None:
    named = ("static:budget=96", "static:budget=32@chunks-only", "static:budget=48,chunk=16", "pid")
    assert question(policies=named, grid=(64,)).statics == ("static:budget=64", "static:budget=96")


def test_everything_is_in_the_json(comparison: Comparison, tmp_path: Path) -> None:
    present(comparison, tmp_path)
    stored = json.loads((tmp_path / "comparison.json").read_bytes())
    assert len(stored["rows"]) == 2 * 6
    assert stored["rows"][0]["figures"]["goodput"]["half_width"] > 0
    assert len(stored["runs"]) == len(comparison.runs)
    assert (tmp_path / "report.html").stat().st_size > 1e6


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"policies": ()}, "nothing to compare"),
        ({"grid": (0, 64)}, "grid is 0"),
        ({"policies": ("pdi",)}, "unknown policy 'pdi'"),
        ({"policies": ("pid@fifo",)}, "'fifo' is not one of"),
        ({"policies": ("clairvoyant:share=0",)}, "share is 0"),
        ({"policies": ("clairvoyant:part=1",)}, "share=NUMBER"),
    ],
)
def test_a_bad_question_is_refused_before_anything_runs(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        question(**changes)


def test_an_slo_that_no_static_meets_needs_rates(tmp_path: Path) -> None:
    asked = question(rates=(), policies=("static:budget=64",), grid=(64,))
    hopeless = Question(asked.title, PLANT, asked.workloads, Slo(tbt_s=1e-3), asked.policies, asked.grid)
    with pytest.raises(ValueError, match="name --rates"):
        compare(hopeless, tmp_path, processes=1)


def test_ctrl_c_leaves_results_and_no_process(tmp_path: Path) -> None:
    flags = ["--num-prompts", "400", "--seeds", "20", "--processes", "2", "--out", str(tmp_path)]
    command = subprocess.Popen([sys.executable, "-m", "run", "compare", *flags], cwd=ROOT, start_new_session=True)
    try:
        deadline_s = time.monotonic() + 200
        unfinished = tmp_path / module.UNFINISHED
        while not (unfinished.exists() and unfinished.stat().st_size):
            assert command.poll() is None and time.monotonic() < deadline_s
            with suppress(subprocess.TimeoutExpired):
                command.wait(0.2)
        workers = psutil.Process(command.pid).children(recursive=True)
        os.killpg(command.pid, signal.SIGINT)
        assert command.wait(60) == 130
        _, left = psutil.wait_procs(workers, timeout=20)
        assert len(workers) >= 2 and not left
    finally:
        command.kill()
