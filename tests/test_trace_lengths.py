from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from envs.trace import PRESETS, Lengths, Workload, make_workload, write_csv


def seeded(seed: int = 7) -> np.random.Generator:
    return np.random.default_rng(seed)


def pairs(workload: Workload) -> list[tuple[int, int]]:
    return list(zip(workload.prompt_tokens.tolist(), workload.output_tokens.tolist(), strict=True))


def test_a_mix_draws_each_part_by_its_share() -> None:
    drawn = pairs(make_workload("poisson:4", "mix:0.7*fixed:10,1+0.2*fixed:20,2+0.1*fixed:30,3", seeded(), 20_000))
    assert set(drawn) == {(10, 1), (20, 2), (30, 3)}
    assert drawn.count((10, 1)) / 20_000 == pytest.approx(0.7, abs=0.015)
    assert drawn.count((30, 3)) / 20_000 == pytest.approx(0.1, abs=0.01)


def test_parts_alternate_by_the_time_of_arrival() -> None:
    workload = make_workload("poisson:5", "alternate:60*fixed:10,1+30*fixed:20,2", seeded(), 5000)
    late = workload.arrival_s % 90 >= 60
    assert 0 < late.sum() < 5000
    assert set(workload.prompt_tokens[late]) == {20}
    assert set(workload.prompt_tokens[~late]) == {10}


def test_conversation_and_long_prompts_alternate_every_minute() -> None:
    workload = make_workload("poisson:20", "alternate:60*conversation+60*long-prompts", seeded(), 20_000)
    long = workload.arrival_s % 120 >= 60
    assert np.median(workload.prompt_tokens[long]) > 5 * np.median(workload.prompt_tokens[~long])


def test_lengths_are_scaled_rounded_and_capped(tmp_path: Path) -> None:
    path = tmp_path / "t.csv"
    write_csv(path, Workload(np.array([1.0, 3.0, 4.0]), np.array([100, 5, 3]), np.array([1, 50, 7])))
    workload = make_workload("trace", f"scaled:0.5/40,2:csv:{path}", seeded())
    assert pairs(workload) == [(40, 2), (2, 100), (2, 14)]  # 2.5 and 1.5 round to even
    assert workload.arrival_s.tolist() == [0.0, 2.0, 3.0]
    assert pairs(make_workload("trace", f"scaled:0.001,0.001:csv:{path}", seeded())) == [(1, 1)] * 3


def test_a_scaled_preset_keeps_its_draws() -> None:
    plain = make_workload("poisson:4", "conversation", seeded(), 2000)
    doubled = make_workload("poisson:4", "scaled:2/3000,1:conversation", seeded(), 2000)
    assert np.array_equal(doubled.prompt_tokens, np.minimum(2 * plain.prompt_tokens, 3000))
    assert np.array_equal(doubled.output_tokens, plain.output_tokens)


def test_a_mix_reads_files_whose_path_has_a_plus_sign(tmp_path: Path) -> None:
    path = tmp_path / "a+b*c.csv"
    write_csv(path, Lengths(np.array([5]), np.array([7])))
    drawn = pairs(make_workload("poisson:4", f"mix:0.5*csv:{path}+0.5*fixed:1,2", seeded(), 100))
    assert set(drawn) == {(5, 7), (1, 2)}


def test_a_part_that_is_too_long_is_drawn_again_at_its_own_time() -> None:
    lengths = "alternate:10*fixed:8,8+10*lognormal:500/1/1000,60/0.8/200"
    workload = make_workload("poisson:10", lengths, seeded(), 2000, max_model_tokens=600)
    assert set(workload.prompt_tokens[workload.arrival_s % 20 < 10]) == {8}
    assert (workload.prompt_tokens + workload.output_tokens).max() <= 600
    assert workload.rejected_requests > 500


def test_a_preset_arrives_at_its_own_rate() -> None:
    workload = make_workload("trace:scale=2", "conversation", seeded(), 20_000)
    gaps_s = np.diff(workload.arrival_s)
    assert 1 / gaps_s.mean() == pytest.approx(2 * 5.53, rel=0.03)
    assert gaps_s.std() / gaps_s.mean() == pytest.approx(1.09, rel=0.03)


LENGTHS = ["fixed:512,64", "uniform:1-900,1-90", "lognormal:500/1/4000,60/0.8/500", *PRESETS]
LENGTHS += [f"mix:0.4*{a}+0.6*{b}" for a, b in zip(PRESETS, LENGTHS, strict=False)]
LENGTHS += [f"alternate:3*{a}+1.5*{b}" for a, b in zip(PRESETS, LENGTHS, strict=False)]
LENGTHS += [f"scaled:0.3/700,1.5/90:{spec}" for spec in LENGTHS]


@given(
    st.sampled_from(["poisson:4", "gamma:4,cv=3", "phases:5:9,3:30", "day:3,peak=1.6,seconds=40"]),
    st.sampled_from(LENGTHS),
    st.integers(0, 2**32),
    st.integers(1, 60),
)
def test_any_spec_and_seed_give_the_same_legal_workload_twice(arrivals: str, lengths: str, seed: int, n: int) -> None:
    n_requests = n if arrivals.startswith(("poisson", "gamma")) else None
    first, again = (make_workload(arrivals, lengths, seeded(seed), n_requests, max_model_tokens=5000) for _ in range(2))
    assert first.arrival_s.tobytes() == again.arrival_s.tobytes()
    assert pairs(first) == pairs(again)
    assert n_requests in (None, len(first))
    assert min(first.prompt_tokens.min(), first.output_tokens.min()) >= 1
    assert (first.prompt_tokens + first.output_tokens).max() <= 5000


@pytest.mark.parametrize(
    ("lengths", "message"),
    [
        ("mix:0.7*conversation+0.4*code", r"the shares add up to 1.1"),
        ("mix:1.5*conversation+-0.5*code", "the shares add up to 1.5"),
        ("mix:conversation+code", "could not convert"),
        ("mix:0.5*conversation+0.5*poems", "lengths 'poems': unknown kind 'poems'"),
        ("mix:0.5*conversation+0.5*mix:1*code", "cannot be told apart"),
        ("mix:0*code+1*conversation", "a part's weight is 0.0"),
        ("alternate:0*code", "a part's weight is 0.0"),
        ("scaled:2:code", "'2' where one entry for prompts and one for outputs"),
        ("scaled:0,1:code", "a length factor is 0.0"),
        ("scaled:1/0,1:code", "a length cap is 0"),
        ("scaled:1,1", "lengths '': unknown kind"),
        ("sharegpt8k", "unknown kind 'sharegpt8k'"),
        ("lognormal:500/1/0,60/1/90", "no draw of .* and the spec's MAX"),
        ("csv", "'csv' names no file: write csv:PATH"),
        ("azure:", "'azure' names no file: write azure:PATH"),
    ],
)
def test_a_wrong_lengths_spec_is_refused_with_the_remedy(lengths: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make_workload("poisson:4", lengths, seeded(), 5)
