import gzip
from pathlib import Path

import numpy as np
import pytest

from envs.trace import (
    Lengths,
    Workload,
    day_arrivals,
    gamma_arrivals,
    make_workload,
    phase_arrivals,
    read_csv,
    write_csv,
)


def seeded(seed: int = 7) -> np.random.Generator:
    return np.random.default_rng(seed)


def small() -> Workload:
    return Workload(np.array([0.0, 0.1, 2.5]), np.array([5, 100, 7]), np.array([1, 50, 3]))


def columns(trace: Workload) -> list[tuple[float, int, int]]:
    return list(zip(trace.arrival_s.tolist(), trace.prompt_tokens.tolist(), trace.output_tokens.tolist(), strict=True))


def test_a_workload_cannot_be_changed_afterwards() -> None:
    arrivals = np.array([0.0, 1.0])
    workload = Workload(arrivals, np.array([1, 2]), np.array([3, 4]))
    arrivals[0] = 9.0
    assert columns(workload) == [(0.0, 1, 3), (1.0, 2, 4)]
    for values in (workload.arrival_s, workload.prompt_tokens, workload.output_tokens):
        with pytest.raises(ValueError, match="read-only"):
            values[0] = 1


@pytest.mark.parametrize(
    ("arrival_s", "prompt", "output", "message"),
    [
        ([0.0, 2.0, 1.0], [1, 1, 1], [1, 1, 1], "row 2: arrival_s 1.0"),
        ([0.0, np.nan], [1, 1], [1, 1], "row 1: arrival_s is nan"),
        ([-1.0, 0.0], [1, 1], [1, 1], "row 0: arrival_s is -1.0"),
        ([0.0, 1.0], [1, 0], [1, 1], "row 1: prompt_tokens is 0"),
        ([0.0, 1.0], [1, 1], [-4, 1], "row 0: output_tokens is -4"),
        ([0.0, 1.0], [1.5, 1.0], [1, 1], "prompt_tokens has shape .* float64"),
        ([0.0], [1, 1], [1, 1], r"\(1,\) arrivals for 2 requests"),
        ([0.0, 1.0], [1, 1], [1], "2 prompts but 1 outputs"),
        ([], [], [], "prompt_tokens has shape"),
    ],
)
def test_a_bad_workload_is_refused_with_its_row(
    arrival_s: list[float], prompt: list[int], output: list[int], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        Workload(np.array(arrival_s), np.array(prompt), np.array(output))


@pytest.mark.parametrize("name", ["trace.csv", "trace.csv.gz"])
def test_a_file_reads_back_exactly(tmp_path: Path, name: str) -> None:
    workload = make_workload("gamma:4,cv=3", "uniform:1-900,1-90", seeded(), n_requests=500)
    write_csv(tmp_path / name, workload)
    read = read_csv(tmp_path / name)
    assert isinstance(read, Workload)
    assert columns(read) == columns(workload)
    assert (tmp_path / name).read_bytes().startswith(b"\x1f\x8b") == name.endswith(".gz")


def test_a_file_without_arrivals_holds_lengths_only(tmp_path: Path) -> None:
    path = tmp_path / "lengths.csv"
    write_csv(path, Lengths(np.array([5, 6]), np.array([7, 8])))
    assert path.read_text() == "arrival_s,prompt_tokens,output_tokens\n,5,7\n,6,8\n"
    read = read_csv(path)
    assert isinstance(read, Lengths)
    assert (read.prompt_tokens.tolist(), read.output_tokens.tolist()) == ([5, 6], [7, 8])


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("time,in,out\n0,1,1\n", "first line is 'time,in,out'"),
        ("arrival_s,prompt_tokens,output_tokens\n0,1,1\n1,x,1\n", "line 3: cannot read '1,x,1'"),
        ("arrival_s,prompt_tokens,output_tokens\n0,1\n", "line 2: cannot read '0,1'"),
        ("arrival_s,prompt_tokens,output_tokens\n0,1,1\n,1,1\n", "data row 1 has no arrival_s"),
        ("arrival_s,prompt_tokens,output_tokens\n0,1,1\n1,0,1\n", "data row 1: prompt_tokens is 0"),
        ("arrival_s,prompt_tokens,output_tokens\n", "no row below its header"),
        ("arrival_s,prompt_tokens,output_tokens\n0,1,1\n1,,1\n", "line 3: cannot read '1,,1' .prompt_tokens is empty"),
    ],
)
def test_a_bad_file_is_refused_with_its_line(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "bad.csv.gz"
    path.write_bytes(gzip.compress(text.encode()))
    with pytest.raises(ValueError, match=message) as caught:
        read_csv(path)
    assert str(path) in str(caught.value)


def test_poisson_gaps_are_exponential_at_the_rate() -> None:
    workload = make_workload("poisson:4", "fixed:512,64", seeded(), n_requests=20_000)
    gaps_s = np.diff(workload.arrival_s)
    assert workload.arrival_s[0] == 0.0
    assert gaps_s.mean() == pytest.approx(0.25, rel=0.03)
    assert gaps_s.std() / gaps_s.mean() == pytest.approx(1.0, rel=0.03)
    assert np.mean(gaps_s > 0.25) == pytest.approx(np.exp(-1), abs=0.02)


@pytest.mark.parametrize("cv", [0.3, 1.0, 3.0])
def test_gamma_gaps_have_the_rate_and_the_variation(cv: float) -> None:
    gaps_s = np.diff(gamma_arrivals(seeded(), 100_000, rate_per_s=20.0, cv=cv))
    assert gaps_s.mean() == pytest.approx(0.05, rel=0.04)
    assert gaps_s.std() / gaps_s.mean() == pytest.approx(cv, rel=0.05)


def test_gamma_with_cv_1_is_poisson() -> None:
    poisson = make_workload("poisson:4", "fixed:8,8", seeded(3), 50)
    gamma = make_workload("gamma:4,cv=1", "fixed:8,8", seeded(3), 50)
    assert poisson.arrival_s.tobytes() == gamma.arrival_s.tobytes()


def test_phases_follow_each_other_at_their_rates() -> None:
    arrival_s = phase_arrivals(seeded(), [(100, 5.0), (50, 80.0), (30, 0.0), (20, 50.0)])
    counts = np.histogram(arrival_s, bins=[0, 100, 150, 180, 200])[0]
    assert np.all(np.diff(arrival_s) >= 0)
    assert counts[2] == 0
    for count, expected in zip(counts[[0, 1, 3]], (500, 4000, 1000), strict=True):
        assert abs(count - expected) < 4 * np.sqrt(expected)  # four standard deviations of a Poisson count


def test_phase_spec_reads_seconds_then_rate() -> None:
    workload = make_workload("phases:10:0.5,5:40,10:0.5", "fixed:512,64", seeded())
    assert workload.arrival_s.tobytes() == phase_arrivals(seeded(), [(10, 0.5), (5, 40), (10, 0.5)]).tobytes()


def test_a_day_rises_from_its_quiet_start_to_its_peak_at_noon() -> None:
    arrival_s = make_workload("day:2,peak=1.8", "fixed:8,8", seeded()).arrival_s
    hours = np.histogram(arrival_s, bins=np.arange(25) * 3600)[0]
    # the rate's integral over each hour: 2 * (t - 0.8 sin(w t) / w), w = 2 pi / day
    edges_s, w = np.arange(25) * 3600, 2 * np.pi / 86_400
    expected = np.diff(2 * (edges_s - 0.8 * np.sin(w * edges_s) / w))
    assert np.all(np.abs(hours - expected) < 4 * np.sqrt(expected))
    assert np.all(np.diff(arrival_s) >= 0)
    assert expected.max() / expected.mean() == pytest.approx(1.8, rel=0.01)


def test_a_compressed_day_keeps_its_rates() -> None:
    workload = make_workload("day:50,peak=2,seconds=600", "fixed:8,8", seeded())
    assert workload.arrival_s.tobytes() == day_arrivals(seeded(), 50, 2, day_s=600).tobytes()
    assert len(workload) == pytest.approx(30_000, rel=0.03)
    night, noon = np.histogram(workload.arrival_s, bins=[0, 30, 285, 315])[0][[0, 2]]
    assert night < 50  # 13 expected
    assert noon == pytest.approx(3000, rel=0.1)


def test_the_same_seed_gives_the_same_bytes_and_another_does_not(tmp_path: Path) -> None:
    def written(name: str, seed: int) -> bytes:
        write_csv(tmp_path / name, make_workload("gamma:4,cv=3", "lognormal:500/1/4000,60/0.8/500", seeded(seed), 200))
        return (tmp_path / name).read_bytes()

    assert written("first.csv.gz", 1) == written("second.csv.gz", 1)
    assert written("first.csv.gz", 1) != written("second.csv.gz", 2)


def test_a_trace_replays_its_rows_in_order_at_the_scaled_rate(tmp_path: Path) -> None:
    path = tmp_path / "t.csv"
    write_csv(path, Workload(np.array([10.0, 11.0, 14.0]), np.array([5, 6, 7]), np.array([1, 2, 3])))
    assert columns(make_workload("trace", f"csv:{path}", seeded())) == [(0.0, 5, 1), (1.0, 6, 2), (4.0, 7, 3)]
    faster = make_workload("trace:scale=2", f"csv:{path}", seeded(), n_requests=2)
    assert columns(faster) == [(0.0, 5, 1), (0.5, 6, 2)]


def test_fixed_and_uniform_lengths_cover_their_range_ends_included() -> None:
    fixed = make_workload("poisson:4", "fixed:512,64", seeded(), 10)
    assert set(fixed.prompt_tokens) == {512}
    assert set(fixed.output_tokens) == {64}
    uniform = make_workload("poisson:4", "uniform:64-67,16-17", seeded(), 400)
    assert set(uniform.prompt_tokens) == {64, 65, 66, 67}
    assert set(uniform.output_tokens) == {16, 17}


def test_lognormal_lengths_have_the_median_and_the_spread() -> None:
    drawn = make_workload("poisson:4", "lognormal:500/0.8/1000000,60/0.5/1000000", seeded(), 20_000)
    for tokens, median, sigma in ((drawn.prompt_tokens, 500, 0.8), (drawn.output_tokens, 60, 0.5)):
        assert np.median(tokens) == pytest.approx(median, rel=0.03)
        assert np.log(tokens).std() == pytest.approx(sigma, rel=0.03)
    assert drawn.rejected_requests == 0


def test_lengths_beyond_the_limits_are_drawn_again_and_counted() -> None:
    workload = make_workload("poisson:4", "lognormal:500/1/1000,60/0.8/200", seeded(), 2000, max_model_tokens=1100)
    assert len(workload) == 2000
    assert workload.prompt_tokens.max() <= 1000
    assert workload.output_tokens.max() <= 200
    assert (workload.prompt_tokens + workload.output_tokens).max() <= 1100
    # P(prompt > 1000) is 24 % and P(output > 200) 7 %: about 0.76 * 0.93 = 71 % of all draws are kept
    assert 2000 / (2000 + workload.rejected_requests) == pytest.approx(0.70, abs=0.03)


def test_pairs_are_drawn_from_a_file_with_replacement(tmp_path: Path) -> None:
    path = tmp_path / "pairs.csv"
    write_csv(path, small())
    drawn = make_workload("poisson:4", f"csv:{path}", seeded(), 300, max_model_tokens=20)
    pairs = list(zip(drawn.prompt_tokens.tolist(), drawn.output_tokens.tolist(), strict=True))
    assert set(pairs) == {(5, 1), (7, 3)}  # (100, 50) is too long
    assert 100 < drawn.rejected_requests < 220  # a third of about 450 draws


def test_a_trace_drops_and_counts_what_does_not_fit(tmp_path: Path) -> None:
    path = tmp_path / "t.csv"
    write_csv(path, small())
    workload = make_workload("trace", f"csv:{path}", seeded(), max_model_tokens=20)
    assert columns(workload) == [(0.0, 5, 1), (2.5, 7, 3)]
    assert workload.rejected_requests == 1
    assert len(small().fitting(150)) == 3
    with pytest.raises(ValueError, match="max_model_tokens 5: raise it"):
        small().fitting(5)


@pytest.mark.parametrize(
    ("arrivals", "lengths", "n_requests", "message"),
    [
        ("poisson:4", "fixed:8,8", None, "n_requests is missing"),
        ("poisson:4", "fixed:8,8", 0, "n_requests is 0"),
        ("poisson:-4", "fixed:8,8", 5, "rate_per_s is -4"),
        ("poisson:4,cv=3", "fixed:8,8", 5, "4,cv=3"),
        ("poisson:inf", "fixed:8,8", 5, "rate_per_s is inf"),
        ("gamma:4", "fixed:8,8", 5, "cv=NUMBER"),
        ("gamma:4,cv=0", "fixed:8,8", 5, "cv is 0.0"),
        ("bursts:4", "fixed:8,8", 5, "unknown kind 'bursts'"),
        ("phases:10", "fixed:8,8", None, "phases:SECONDS:RATE"),
        ("phases:10:1", "fixed:8,8", 5, "leave out n_requests 5"),
        ("phases:10:0", "fixed:8,8", None, "no request arrived"),
        ("phases:10:-1", "fixed:8,8", None, "phase rate is -1"),
        ("day:2", "fixed:8,8", None, "'2' where MEAN_RATE,peak=RATIO belongs"),
        ("day:2,peak=2.5", "fixed:8,8", None, "peak is 2.5"),
        ("day:0,peak=1.5", "fixed:8,8", None, "mean rate is 0.0"),
        ("day:2,peak=1.5,seconds=-1", "fixed:8,8", None, "seconds is -1.0"),
        ("day:2,peak=1.5", "fixed:8,8", 5, "leave out n_requests 5"),
        ("day:0.000001,peak=1,seconds=1", "fixed:8,8", None, "no request arrived in the day"),
        ("trace", "fixed:8,8", None, "not a trace file"),
        ("trace:rate=2", "conversation", 5, "scale=NUMBER"),
        ("trace", "arxiv", 5, "'arxiv' has lengths only"),
        ("trace", "scaled:1,1:conversation", 5, "'conversation' is not a trace file"),
        ("poisson:4", "fixed:8", 5, "fixed:PROMPT,OUTPUT"),
        ("poisson:4", "fixed:0,8", 5, "'0' is not a number of tokens"),
        ("poisson:4", "uniform:9-8,1-2", 5, "'9-8'"),
        ("poisson:4", "lognormal:500/0/900,60/1/90", 5, "sigma is 0.0"),
        ("poisson:4", "normal:5,5", 5, "unknown kind 'normal'"),
        ("poisson:4", "fixed:80,80", 5, "max_model_tokens 100"),
    ],
)
def test_a_wrong_spec_is_refused_with_the_remedy(
    arrivals: str, lengths: str, n_requests: int | None, message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        make_workload(arrivals, lengths, seeded(), n_requests, max_model_tokens=100)


def test_a_file_of_lengths_has_no_arrivals_to_replay(tmp_path: Path) -> None:
    path = tmp_path / "l.csv"
    write_csv(path, Lengths(np.array([5]), np.array([7])))
    with pytest.raises(ValueError, match="has lengths only; generate arrivals"):
        make_workload("trace", f"csv:{path}", seeded())


def test_rows_may_be_in_any_order_of_arrival(tmp_path: Path) -> None:
    path = tmp_path / "killed.csv"
    path.write_text("arrival_s,prompt_tokens,output_tokens\n2,30,3\n0.5,10,1\n2,40,4\n1,20,2\n")
    read = read_csv(path)
    assert isinstance(read, Workload)
    assert columns(read) == [(0.5, 10, 1), (1.0, 20, 2), (2.0, 30, 3), (2.0, 40, 4)]
    path.write_text("arrival_s,prompt_tokens,output_tokens\n2,30,3\n0.5,10,0\n")
    with pytest.raises(ValueError, match="data row 1: output_tokens is 0"):
        read_csv(path)


def test_a_model_without_room_for_a_prompt_and_an_output_is_refused() -> None:
    for arrivals in ("poisson:4", "trace"):
        with pytest.raises(ValueError, match="max_model_tokens is 0; it must leave room"):
            make_workload(arrivals, "conversation", seeded(), 5, max_model_tokens=0)
