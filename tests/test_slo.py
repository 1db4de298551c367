import json
from pathlib import Path
from typing import Literal

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from envs.outcome import Outcome
from envs.slo import Slo, within
from envs.trace import Workload
from profiles.bench_report import format_console, peak_concurrent_requests, peak_tokens_per_s, summarise, write_json
from profiles.load import LoadResult, RequestRecord

NO_GAPS = np.empty(0)


def test_text_is_read_in_milliseconds_and_written_back() -> None:
    slo = Slo.parse("ttft:2000 tbt:100 deadline:40 tpot:50.5 e2el:30000 quantile:0.95")
    assert slo == Slo(tbt_s=0.1, ttft_s=2.0, tpot_s=0.0505, deadline_s=0.04, e2el_s=30.0, quantile=0.95)
    assert str(slo) == "tbt:100 ttft:2000 tpot:50.5 deadline:40 e2el:30000 quantile:0.95"


def test_itl_is_another_word_for_tbt_and_p99_is_the_default() -> None:
    assert Slo.parse("itl:25") == Slo(tbt_s=0.025, quantile=0.99)
    assert str(Slo.parse("itl:25")) == "tbt:25"


@given(st.integers(1, 10**7), st.integers(1, 10**7), st.integers(1, 1000))
def test_parse_reads_back_what_str_wrote(tbt_us: int, ttft_us: int, quantile_thousandths: int) -> None:
    text = f"tbt:{tbt_us / 1e3} ttft:{ttft_us / 1e3} quantile:{quantile_thousandths / 1e3}"
    assert Slo.parse(str(Slo.parse(text))) == Slo.parse(text)


@pytest.mark.parametrize(
    ("text", "named"),
    [
        ("", "no bound"),
        ("quantile:0.9", "no bound"),
        ("latency:5", "unknown word 'latency'"),
        ("tbt", "''"),
        ("tbt:fast", "'fast'"),
        ("tbt:100 itl:50", "given twice"),
        ("tbt:-5", "-0.005"),
        ("tbt:0", "0.0"),
        ("deadline:-1", "deadline_s is -0.001"),
        ("ttft:nan", "nan"),
        ("ttft:inf", "inf"),
        ("tbt:5 quantile:99", "99"),
        ("tbt:5 quantile:0", "0.0"),
    ],
)
def test_a_wrong_slo_is_refused_by_name(text: str, named: str) -> None:
    with pytest.raises(ValueError, match="SLO") as caught:
        Slo.parse(text)
    assert named in str(caught.value)


def test_a_request_meets_tbt_by_its_own_quantile() -> None:
    gaps_s = np.array([0.01] * 100 + [0.5])  # the worst of 101 gaps is beyond their P99, and is P100
    assert np.percentile(gaps_s, 99) == 0.01
    assert Slo(tbt_s=0.01).met(0.1, gaps_s, 2.0)
    assert not Slo(tbt_s=0.01, quantile=1.0).met(0.1, gaps_s, 2.0)
    assert not Slo(tbt_s=0.01).met(0.1, gaps_s[1:], 2.0)  # 100 gaps: linear P99 is a little above 0.01


def test_tpot_bounds_the_mean_gap() -> None:
    gaps_s = np.array([0.25, 0.5, 0.75])
    assert Slo(tpot_s=0.5).met(0.1, gaps_s, 2.0)
    assert not Slo(tpot_s=0.499).met(0.1, gaps_s, 2.0)


def test_a_deadline_is_counted_from_the_first_token_or_its_bound() -> None:
    """Tokens 1, 1.25, 1.5, 2.25, 2.5 and 2.75 s after the arrival."""
    gaps_s = np.array([0.25, 0.25, 0.75, 0.25, 0.25])
    assert Slo.parse("deadline:250").late_tokens(1.0, gaps_s) == 3
    assert Slo.parse("deadline:250 ttft:500").late_tokens(1.0, gaps_s) == 3, "a late first token takes nothing"
    assert Slo.parse("deadline:250 ttft:1250").late_tokens(1.0, gaps_s) == 3
    assert Slo.parse("deadline:250 ttft:1500").late_tokens(1.0, gaps_s) == 0, "half a second was gained by the first"
    assert Slo.parse("deadline:300").late_tokens(1.0, gaps_s) == 3
    assert Slo.parse("deadline:350").late_tokens(1.0, gaps_s) == 2, "the last has caught up: it is due at 2.75 s"


def test_a_request_keeps_its_deadline_if_few_enough_tokens_are_late() -> None:
    gaps_s = np.full(99, 0.25)
    gaps_s[-1] = 0.5  # the last of 100 tokens
    assert Slo.parse("deadline:250").met(1.0, gaps_s, 26.0)
    assert not Slo.parse("deadline:250 quantile:0.991").met(1.0, gaps_s, 26.0)
    assert not Slo.parse("deadline:250").met(1.0, gaps_s[1:], 25.75), "one of 99 is more than 1 %"
    assert not Slo.parse("deadline:250 ttft:500").met(1.0, gaps_s, 26.0), "the bound on TTFT is judged by itself"
    assert Slo.parse("deadline:1 quantile:0.5").met(1.0, gaps_s[:1], 1.25), "one of two"
    assert Slo.parse("deadline:250 quantile:0.9").met(1.0, gaps_s[-9:], 3.25), "one of ten, for all its rounding"
    assert Slo.parse("deadline:0.001").met(5.0, NO_GAPS, 5.0), "a first token is never late"
    with pytest.raises(ValueError, match="add deadline"):
        Slo(tbt_s=1.0).late_tokens(1.0, gaps_s)


times = st.lists(st.lists(st.integers(1, 9), min_size=1, max_size=12), min_size=1, max_size=8)


@given(times, st.sampled_from(["deadline:40", "deadline:60 ttft:85", "tbt:42 deadline:50 quantile:0.75", "tpot:44.9"]))
def test_a_run_is_judged_as_each_of_its_requests(gaps: list[list[int]], text: str) -> None:
    """Gaps in units of 10 ms, the first of each request before its first token. Deadlines may be met to the point."""
    slo, arrival_s = Slo.parse(text), 0.25 * np.arange(len(gaps), dtype=np.float64)
    since_s = [np.cumsum(np.array(ticks) / 100) for ticks in gaps]
    lengths = np.array([len(ticks) for ticks in gaps])
    rows, empty = np.concatenate(([0], np.cumsum(lengths)[:-1])), np.zeros(0)
    came_s = np.concatenate([since + at for since, at in zip(since_s, arrival_s, strict=True)])
    workload = Workload(arrival_s, np.ones_like(lengths), lengths)
    run = Outcome(workload, arrival_s, lengths, rows, came_s, 1.0, 1, 0, empty, empty, empty)
    alone = [(t[0], np.diff(t), t[-1]) for t in since_s]
    if slo.deadline_s is not None:
        late = [slo.late_tokens(ttft_s, gaps_s) for ttft_s, gaps_s, _ in alone]
        assert run.late_shares(slo).tolist() == (np.array(late) / lengths).tolist()
        assert run.tokens_on_time(slo) == pytest.approx(1 - sum(late) / lengths.sum())
    assert run.met(slo).tolist() == [slo.met(*latencies) for latencies in alone]


@given(st.lists(st.integers(0, 9)), st.integers(0, 9), st.sampled_from([0.5, 0.75, 0.9, 0.99, 1.0]))
def test_within_is_numpys_quantile(values: list[int], bound: int, quantile: float) -> None:
    array = np.array(values, np.float64)
    assert within(array, bound, quantile) == (not values or bool(np.quantile(array, quantile) <= bound))


def test_the_pace_is_what_keeps_every_bound_on_tokens() -> None:
    assert Slo.parse("tbt:40 tpot:30 deadline:50 ttft:10").pace_s == 0.03
    assert Slo.parse("deadline:50").pace_s == 0.05
    assert Slo.parse("ttft:10 e2el:100").pace_s is None


def test_every_bound_that_is_set_must_hold() -> None:
    gaps_s = np.array([0.02, 0.02])
    slo = Slo(tbt_s=0.02, ttft_s=1.0, tpot_s=0.02, e2el_s=2.0)
    assert slo.met(1.0, gaps_s, 2.0)
    assert not slo.met(1.001, gaps_s, 2.0)
    assert not slo.met(1.0, gaps_s, 2.001)
    assert not slo.met(1.0, gaps_s + 0.001, 2.0)


def test_a_single_token_has_no_gap_to_break() -> None:
    assert Slo(tbt_s=0.001, tpot_s=0.001).met(5.0, NO_GAPS, 5.0)
    assert not Slo(tbt_s=0.001, ttft_s=1.0).met(5.0, NO_GAPS, 5.0)


def test_share_of_tokens_counts_the_gaps_within_the_bound() -> None:
    assert Slo(tbt_s=0.02).share_of_tokens(np.array([0.01, 0.02, 0.021, 0.5])) == 0.5
    assert Slo(tbt_s=0.02).share_of_tokens(NO_GAPS) == 1.0
    with pytest.raises(ValueError, match="add tbt"):
        Slo(ttft_s=1.0).share_of_tokens(np.array([0.01]))


def record(
    sent_s: float,
    times_s: list[float],
    status: Literal["completed", "failed", "unfinished"] = "completed",
    n_tokens: int | None = None,
    error: str = "",
) -> RequestRecord:
    """A request of 10 prompt tokens, due 0.25 s before it was sent, of one token a chunk unless told."""
    n_tokens = len(times_s) if n_tokens is None else n_tokens
    return RequestRecord(sent_s - 0.25, sent_s, 10, times_s, n_tokens, status, error)


def measured() -> LoadResult:
    """Four requests in four seconds; times are exact in binary."""
    records = [
        record(0.25, [0.5, 0.75, 1.25]),  # TTFT 0.25, gaps 0.25 0.5, E2EL 1
        record(0.5, [1.5, 2.0], n_tokens=3),  # TTFT 1, one gap of 0.5 and one of 0 inside a chunk, E2EL 1.5
        record(1.0, [1.25, 3.25], status="unfinished"),  # gap 2
        record(1.25, [], status="failed", error="HTTP 500: no"),
    ]
    return LoadResult("tiny", records, 4.0, planned_requests=4, rejected_requests=6, interrupted=False)


def test_a_report_has_the_figures_worked_out_by_hand() -> None:
    summary = summarise(measured(), Slo.parse("tbt:500 ttft:500 quantile:1"))
    expected = {
        "duration": 4.0,
        "completed": 2,
        "failed": 1,
        "unfinished": 1,
        "rejected_requests": 6,
        "total_input_tokens": 20,
        "total_output_tokens": 6,
        "request_throughput": 0.5,
        "request_goodput": 0.25,  # the second is late with its first token
        "slo_attainment": 0.25,
        "share_of_tokens_in_slo": 0.8,  # gaps 0.25 0.5 | 0.5 0 | 2
        "output_throughput": 1.5,
        "total_token_throughput": 6.5,
        "max_output_tokens_per_s": 3.0,  # of those completed: 0.5 0.75 in the second from 0.25 on, then 1.25 1.5 2.0
        "max_concurrent_requests": 2,
        "mean_ttft_ms": 625.0,
        "median_ttft_ms": 625.0,
        "std_ttft_ms": 375.0,
        "p99_ttft_ms": 992.5,
        "mean_tpot_ms": 312.5,  # (1 - 0.25) / 2 and (1.5 - 1) / 2
        "median_tpot_ms": 312.5,
        "mean_itl_ms": 1250 / 3,
        "median_itl_ms": 500.0,
        "mean_e2el_ms": 1250.0,
        "p99_e2el_ms": 1495.0,
        "input_lens": [10, 10, 10, 10],
        "output_lens": [3, 3, 0, 0],
        "ttfts": [0.25, 1.0, 0.25, 0.0],
        "itls": [[0.25, 0.5], [0.5], [2.0], []],
        "latencies": [1.0, 1.5, 2.25, 0.0],
        "queue_times": [0.25, 0.25, 0.25, 0.25],
        "errors": ["", "", "", "HTTP 500: no"],
        "client_lateness": {"p99_ms": 250.0, "max_ms": 250.0},
    }
    for key, value in expected.items():
        assert summary[key] == (pytest.approx(value) if isinstance(value, float) else value), key


def test_a_report_tells_how_many_tokens_were_on_time() -> None:
    """Tokens after 0.25 0.5 1 | 1 1.5 and one in that chunk | 0.25 2.25 s; the first and the last are late once."""
    summary = summarise(measured(), Slo.parse("deadline:300 ttft:900 quantile:0.6"))
    assert summary["share_of_tokens_on_time"] == pytest.approx(1 - 2 / 8)
    assert (summary["slo_attainment"], "share_of_tokens_in_slo" in summary) == (0.25, False)
    assert f"{'Tokens on time (%):':<40} 75.00" in format_console(summary)
    nothing = LoadResult("tiny", [record(0.0, [], "failed", error="no")], 1.0, 1, 0, False)
    assert summarise(nothing, Slo.parse("deadline:100"))["share_of_tokens_on_time"] is None


def test_report_percentiles_are_numpys() -> None:
    rng = np.random.default_rng(5)
    times_s = [np.cumsum(rng.exponential(0.05, 40)).tolist() for _ in range(30)]
    summary = summarise(LoadResult("tiny", [record(0.0, t) for t in times_s], 3.0, 30, 0, False))
    first_ms, gaps_ms, last_ms = (
        1e3 * np.array([t[0] for t in times_s]),
        1e3 * np.diff(times_s, axis=1),
        1e3 * np.array([t[-1] for t in times_s]),
    )
    for metric, values in {"ttft": first_ms, "itl": gaps_ms, "tpot": gaps_ms.mean(axis=1), "e2el": last_ms}.items():
        assert summary[f"mean_{metric}_ms"] == pytest.approx(np.mean(values))
        assert summary[f"median_{metric}_ms"] == pytest.approx(np.median(values))
        assert summary[f"std_{metric}_ms"] == pytest.approx(np.std(values))
        assert summary[f"p99_{metric}_ms"] == pytest.approx(np.percentile(values, 99))
        assert summary[f"max_{metric}_ms"] == pytest.approx(np.max(values))


def test_the_console_reads_as_in_vllm_bench_serve() -> None:
    text = format_console(summarise(measured(), Slo.parse("tbt:500 ttft:500 quantile:1")))
    assert [line.rstrip() for line in text.splitlines()] == [
        "============ Serving Benchmark Result ============",
        "Successful requests:                     2",
        "Failed requests:                         1",
        "Benchmark duration (s):                  4.00",
        "Total input tokens:                      20",
        "Total generated tokens:                  6",
        "Request throughput (req/s):              0.50",
        "Request goodput (req/s):                 0.25",
        "Output token throughput (tok/s):         1.50",
        "Peak output token throughput (tok/s):    3.00",
        "Peak concurrent requests:                2.00",
        "Total token throughput (tok/s):          6.50",
        "---------------Time to First Token----------------",
        "Mean TTFT (ms):                          625.00",
        "Median TTFT (ms):                        625.00",
        "P99 TTFT (ms):                           992.50",
        "-----Time per Output Token (excl. 1st token)------",
        "Mean TPOT (ms):                          312.50",
        "Median TPOT (ms):                        312.50",
        "P99 TPOT (ms):                           373.75",
        "---------------Inter-token Latency----------------",
        "Mean ITL (ms):                           416.67",
        "Median ITL (ms):                         500.00",
        "P99 ITL (ms):                            500.00",
        "----------------End-to-end Latency----------------",
        "Mean E2EL (ms):                          1250.00",
        "Median E2EL (ms):                        1250.00",
        "P99 E2EL (ms):                           1495.00",
        "----------------------Pacer-----------------------",
        "Unfinished requests:                     1",
        "Rejected requests (too long):            6",
        "P99 client lateness (ms):                250.00",
        "Max client lateness (ms):                250.00",
        "SLO:                                     tbt:500 ttft:500 quantile:1",
        "Requests within SLO (%):                 25.00",
        "Tokens within TBT SLO (%):               80.00",
        "1 failed: HTTP 500: no",
        "==================================================",
    ]


def test_without_an_slo_there_is_no_goodput() -> None:
    summary = summarise(measured())
    assert summary["request_goodput"] is None
    assert "slo" not in summary
    assert "goodput" not in format_console(summary)


def test_a_statistic_of_nothing_is_no_number() -> None:
    failed = LoadResult("tiny", [record(0.0, [], "failed", error="no")], 1.0, 1, 0, False)
    summary = summarise(failed, Slo.parse("tbt:100"))
    assert summary["p99_ttft_ms"] is None
    assert summary["share_of_tokens_in_slo"] is None
    assert (summary["request_goodput"], summary["slo_attainment"]) == (0.0, 0.0)
    assert (summary["max_output_tokens_per_s"], summary["max_concurrent_requests"]) == (0.0, 0)
    assert f"{'P99 TTFT (ms):':<40} -" in format_console(summary)


def test_a_request_ends_before_the_next_begins_at_the_same_time() -> None:
    apart = [record(0.0, [0.5, 1.0]), record(1.0, [1.5, 2.0]), record(2.0, [3.0])]
    assert peak_concurrent_requests(apart) == 1
    assert peak_concurrent_requests([*apart, record(0.75, [2.5])]) == 2
    assert peak_tokens_per_s(apart) == 2.0  # 1.0 and 1.5


def test_the_file_holds_the_lists_only_when_asked(tmp_path: Path) -> None:
    summary = summarise(measured())
    write_json(tmp_path / "short.json", summary)
    write_json(tmp_path / "long.json", summary, detailed=True)
    short, long = (json.loads((tmp_path / name).read_text()) for name in ("short.json", "long.json"))
    assert long == summary
    assert short == {key: value for key, value in summary.items() if not isinstance(value, list)}
