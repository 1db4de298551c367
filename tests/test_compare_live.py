"""The live comparison: real engines and sidecars, and what it refuses."""

import json
import subprocess
import sys
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from envs.slo import Slo
from profiles.bench_report import summarise
from profiles.compare_live import run_of
from profiles.load import LoadResult, RequestRecord

ROOT = Path(__file__).parent.parent


def compare(out: Path, *flags: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "run", "compare", "--live", "--trace", "uniform:16-64,4-8", "--out", str(out)]
    return subprocess.run([*command, *flags], capture_output=True, text=True, check=False, cwd=ROOT, timeout=280)


def test_policies_and_schedules_are_compared_on_real_engines(tmp_path: Path) -> None:
    policies = ("static:budget=64", "pid", "static:budget=64@prefill-first")
    flags = ("--rates", "8", "--seeds", "1", "--num-prompts", "6", "--slo", "tbt:500")
    interrupted = tmp_path / "runs" / "pid_8_0" / "journal"
    interrupted.mkdir(parents=True)
    (interrupted / "part-00000.parquet").write_bytes(b"of a comparison before")
    answer = compare(tmp_path, "--policies", *policies, *flags)
    assert answer.returncode == 0, answer.stderr
    stored = json.loads((tmp_path / "comparison.json").read_bytes())
    assert [row["contender"] for row in stored["rows"]] == [*policies, "best single static", "oracle static"]
    assert all(row["figures"]["finished"]["mean"] == 1 for row in stored["rows"])
    assert stored["capacities"] == {}
    assert (tmp_path / "report.html").exists()
    assert all(pq.read_table(part).num_rows for part in interrupted.glob("*.parquet")), "nothing is left of another run"


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("--policies", "pid"), "--rates"),
        (("--policies", "clairvoyant", "--rates", "1"), "simulation alone"),
        (("--policies", "pid", "--rates", "1"), "--grid"),
    ],
)
def test_a_live_comparison_that_cannot_be_is_refused(tmp_path: Path, flags: tuple[str, ...], message: str) -> None:
    answer = compare(tmp_path, *flags)
    assert answer.returncode == 2
    assert message in answer.stderr
    assert "Traceback" not in answer.stderr


def test_a_replay_becomes_a_run() -> None:
    done = RequestRecord(0.0, 0.0, 8, [0.5, 0.6, 0.8], 3, "completed")
    waiting = RequestRecord(1.0, 1.0, 8)
    run = run_of(summarise(LoadResult("m", [done, waiting], 4.0, 2, 0, False), Slo(tbt_s=0.15)), "pid", 2.0, 0)
    assert run.figures["ttft_p50_s"] == pytest.approx((0.5 + 3.0) / 2)
    assert run.figures["tbt_p50_s"] == pytest.approx(0.15)
    assert run.figures["finished"] == 0.5
    assert run.figures["goodput"] == 0.0
    assert run.figures["tokens_in_slo"] == 0.5
    assert sum(run.ttft_counts) == sum(run.tbt_counts) == 2
    slo = Slo(tpot_s=0.15, deadline_s=0.12)
    run = run_of(summarise(LoadResult("m", [done, waiting], 4.0, 2, 0, False), slo), "pid", 2.0, 0)
    assert run.figures["tpot_p99_s"] == pytest.approx(0.15)
    assert run.figures["tokens_on_time"] == pytest.approx(2 / 3), "the last came 0.3 s after the first"
    assert "tokens_in_slo" not in run.figures
