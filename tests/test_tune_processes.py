"""Tuning in processes: studies that outlive theirs, several on one study, Ctrl-C, and the whole command."""

import argparse
import itertools
import os
import re
import signal
import sqlite3
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import msgspec
import optuna
import psutil
import pytest
import sqlalchemy
from optuna.trial import TrialState
from test_tune import problem as small_problem
from test_tune import search, tuner

from engine.protocol import Bounds
from engine.tuned import Tuned
from envs.slo import Slo
from profiles import tune_storage, tune_study
from profiles.compare_flags import H200
from profiles.parallel import in_parallel, worker_pool
from profiles.tune import run_asked
from profiles.tune_flags import add_flags, problem
from profiles.tune_space import static_knobs

ROOT = Path(__file__).parent.parent
ENV = os.environ | {"PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'tests'}"}

CHILD = """
import sys
from pathlib import Path
from test_tune import search
if __name__ == "__main__":
    one = search(Path(sys.argv[1]), trials=10_000)
    one.begin([], [])
    while True:
        print(one.one_trial().trials, flush=True)
"""


def test_a_study_killed_mid_trial_loses_no_finished_one_and_tries_that_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    kept, left = kill_a_search(tmp_path)
    while not left:  # it was killed between two trials, or before the new one had told that it lives
        more, left = kill_a_search(tmp_path)
        kept |= more
    after = {t.number: (t.values, t.params) for t in trials_in(tmp_path) if t.state.is_finished()}
    assert len(kept) >= 5 and kept.items() <= after.items()
    monkeypatch.setattr(tune_storage, "GRACE_S", 1)
    forget()
    try:
        one = search(tmp_path, trials=10_000)
        while not any("failed_trial" in t.system_attrs and t.state.is_finished() for t in one.study().trials):
            one.one_trial()
        trials = {t.number: t for t in one.study().trials}
    finally:
        forget()
    assert {number: (trials[number].values, trials[number].params) for number in after} == after
    assert all(trials[t.number].state == TrialState.FAIL for t in left)
    again = {t.system_attrs["failed_trial"]: t for t in trials.values() if "failed_trial" in t.system_attrs}
    assert all(t.params.items() <= again[t.number].params.items() for t in left)  # it may not have known all of them


def kill_a_search(folder: Path) -> tuple[dict[int, Any], list[optuna.trial.FrozenTrial]]:
    """The trials seen finished before a process that searches was killed, and those that it left running."""
    command = [sys.executable, "-c", CHILD, str(folder)]
    with subprocess.Popen(command, env=ENV, stdout=subprocess.PIPE, text=True) as child:
        try:
            assert child.stdout is not None
            first = int(child.stdout.readline())
            while int(child.stdout.readline()) < first + 5:
                pass
            while not any(t.state == TrialState.RUNNING and t.params for t in trials_in(folder)):
                pass
            kept = {t.number: (t.values, t.params) for t in trials_in(folder) if t.state.is_finished()}
        finally:
            child.kill()
    assert child.returncode == -signal.SIGKILL
    with sqlite3.connect(folder / "study.db") as database:
        alive = {row[0] for row in database.execute("SELECT trial_id FROM trial_heartbeats")}
    running = [t for t in trials_in(folder) if t.state == TrialState.RUNNING]
    return kept, [t for t in running if t._trial_id in alive]


def forget() -> None:
    """Open databases anew, with what is set now."""
    tune_storage.open_storage.cache_clear()
    tune_study._opened.cache_clear()


def trials_in(folder: Path) -> list[optuna.trial.FrozenTrial]:
    """Read beside the process that searches, without taking its trials for dead."""
    return optuna.load_study(study_name="tuned-static", storage=f"sqlite:///{folder / 'study.db'}").trials


def test_four_processes_on_one_study_find_what_one_finds(tmp_path: Path) -> None:
    verdicts, seconds = {}, {}
    for processes in (1, 4):
        folder = tmp_path / str(processes)
        folder.mkdir()
        with worker_pool(processes) as pool:
            list(in_parallel(pool, abs, range(processes)))
            began_s = time.perf_counter()
            verdicts[processes] = tuner(folder, pool, 14).static(small_problem())
            seconds[processes] = time.perf_counter() - began_s
    print({"seconds": seconds})
    one, four = (verdicts[n].tuned for n in (1, 4))
    assert one.trials == four.trials == 14
    assert one.best and four.best and four.best.capacity == pytest.approx(one.best.capacity, rel=0.02)
    study = tune_study.load_study(f"sqlite:///{tmp_path / '4' / 'study.db'}", verdicts[4].study)
    assert sorted(t.number for t in study.trials) == list(range(len(study.trials)))
    assert all(t.state.is_finished() for t in study.trials)


def flags(*given: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    add_flags(parser)
    return parser.parse_args(given)


SMALL = ["--num-prompts", "200", "--seeds", "2", "--trials", "4", "--processes", "2"]
COMMAND = """
import sys, time
from test_tune_processes import flags
from profiles.tune import run_asked
if __name__ == "__main__":
    sys.exit(run_asked(flags(*sys.argv[1:]), time.monotonic_ns, ""))
"""


def test_ctrl_c_keeps_what_was_found_and_leaves_no_process(tmp_path: Path) -> None:
    given_flags = [*SMALL, "--trials", "1000", "--policies", "static", "--out", str(tmp_path)]
    with subprocess.Popen([sys.executable, "-c", COMMAND, *given_flags], env=ENV, start_new_session=True) as command:
        try:
            while len(finished := _finished(tmp_path)) < 3:
                assert command.poll() is None
            workers = psutil.Process(command.pid).children(recursive=True)
            os.killpg(command.pid, signal.SIGINT)
            assert command.wait(60) != 0
            _, left = psutil.wait_procs(workers, timeout=20)
            assert len(workers) >= 2 and not left
        finally:
            command.kill()
    assert finished.items() <= _finished(tmp_path).items()


def _finished(folder: Path) -> dict[int, dict[str, Any]]:
    """The parameters of the only study's finished trials."""
    url = f"sqlite:///{folder / 'study.db'}"
    try:
        (name,) = optuna.get_all_study_names(url)
        trials = optuna.load_study(study_name=name, storage=url).trials
    except (ValueError, sqlalchemy.exc.SQLAlchemyError, optuna.exceptions.StorageInternalError):
        return {}  # it is being made
    return {trial.number: trial.params for trial in trials if trial.state.is_finished()}


def test_the_command_writes_knobs_that_an_engine_takes_and_goes_on_where_it_was(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    args = flags(*SMALL, "--policies", "static", "predictive", "--out", str(tmp_path))
    assert run_asked(args, lambda: 0, "2025-01-01 00:00") == 0
    (path,) = tmp_path.glob("*.tuned.json")
    assert path.name == "h200-mistral-7b.tuned.json"
    tuned = Tuned.load(path)
    assert set(tuned.laws) == {"static", "predictive"} and tuned.policy in tuned.laws.values()
    assert static_knobs(tuned.laws["static"]) == (tuned.budget_tokens, tuned.chunk_tokens)
    assert Slo.parse(tuned.slo) == Slo.parse("tbt:40")
    scores = tuned.provenance["scores"]["static"]
    assert {"guess", "tuned", "random", "grid", "beat_random", "pareto_front"} == set(scores)
    front = scores["pareto_front"]
    assert front and all(
        a["capacity"] > b["capacity"] and a["ttft_s"] > b["ttft_s"] for a, b in itertools.pairwise(front)
    )
    assert (tmp_path / "report.html").stat().st_size > 1000
    out = capsys.readouterr().out
    assert "static: random" in out and "random search" in out

    assert run_asked(args, lambda: 0, "2025-01-01 00:00") == 0  # all is done: nothing changes
    assert msgspec.to_builtins(Tuned.load(path)) == msgspec.to_builtins(tuned)


def test_time_that_is_up_leaves_laws_untuned_and_what_was_found_in_a_file(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    args = flags(*SMALL, "--policies", "pid", "static", "pid", "--timeout", "1", "--out", str(tmp_path))
    moments_ns = itertools.chain([0], itertools.repeat(2 * 10**9))
    assert run_asked(args, lambda: next(moments_ns), "") == 0
    (path,) = tmp_path.glob("*.tuned.json")
    tuned = Tuned.load(path)
    assert set(tuned.laws) == {"static"} and tuned.provenance["scores"]["static"]["beat_random"] is None
    out = capsys.readouterr().out
    assert "static: not compared with random search, which had 0 runs" in out
    assert "Not tuned, for want of time: pid. Give" in out
    assert len(trials_of_all(tmp_path)) == 1  # the guess


def trials_of_all(folder: Path) -> list[optuna.trial.FrozenTrial]:
    url = f"sqlite:///{folder / 'study.db'}"
    names = optuna.get_all_study_names(url)
    return [
        t for name in names for t in optuna.load_study(study_name=name, storage=url).trials if t.state.is_finished()
    ]


def test_the_profiled_engine_is_the_one_tuned_for_and_a_flag_wins(tmp_path: Path) -> None:
    profile = H200.with_name("h200-mistral-7b-pacer.json")
    held = msgspec.json.decode(profile.read_bytes())["provenance"]["capacities"]
    small = ["--profile", str(profile), "--num-prompts", "20", "--seeds", "1"]
    config = problem(flags(*small), "")[0].plant.config
    assert config.bounds == Bounds(16, held["max_budget_tokens"], 16, held["max_requests"], held["kv_blocks"] * 128)
    assert config.max_model_tokens == held["max_model_tokens"] and config.look_ahead
    assert config.block_tokens == held["block_tokens"] == 128
    small += ["--kv-blocks", "9000", "--max-num-seqs", "64", "--max-model-len", "4096"]
    config = problem(flags(*small, "--max-num-batched-tokens", "512"), "")[0].plant.config
    assert config.bounds == Bounds(16, 512, 16, 64, 9000 * 16) and config.max_model_tokens == 4096
    broken = tmp_path / "broken.json"
    broken.write_text(re.sub(r'"kv_blocks": \d+', '"kv_blocks": "many"', profile.read_text()))
    with pytest.raises(ValueError, match=r"broken.json: provenance.capacities: .*kv_blocks"):
        problem(flags("--profile", str(broken)), "")


@pytest.mark.parametrize(
    ("given_flags", "message"),
    [
        (["--trials", "0"], "--trials is 0; it must be at least 1"),
        (["--processes", "0"], "--processes is 0"),
        (["--timeout", "0"], "--timeout is 0"),
        (["--timeout", "nan"], "--timeout is nan"),
        (["--seeds", "0"], "--seeds is 0"),
        (["--seed", "-1"], "--seed is -1"),
        (["--num-prompts", "0"], "--num-prompts is 0"),
        (["--kv-blocks", "0"], "--kv-blocks is 0"),
        (["--hold"], "--hold is for --live"),
        (["--storage", "foo"], "'foo' is no database URL"),
        (["--slo", "ttft:2000"], "policy 'pid' needs to know the promise: .*; or leave pid out of --policies"),
        (["--slo", "tbt:1", "--num-prompts", "50", "--policies", "static"], "no static budget keeps tbt:1 at any rate"),
        (["--slo", "nothing"], "unknown word 'nothing'"),
    ],
)
def test_what_cannot_be_tuned_is_refused_with_the_remedy(given_flags: list[str], message: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=message):
        run_asked(flags(*given_flags, "--out", str(tmp_path)), lambda: 0, "")
