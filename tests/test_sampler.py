"""Sampling: the distribution drawn from, and that a draw depends on its number and its logits alone."""

from collections.abc import Sequence

import numpy as np
import pytest
import torch
from transformers import TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

from engine.philox import uniforms
from engine.request import SamplingParams
from engine.sampler import Draws, sample

CHI_SQUARE_999 = {2: 13.82, 5: 20.52, 9: 27.88}  # 99.9 % quantile by degrees of freedom
LOGITS = torch.tensor([1.5, -0.3, 0.9, 2.2, -1.0, 0.1, 1.1, -2.0, 0.4, 1.9])
ALMOST_ONE = 1.0 - 2.0**-53


def params(temperature: float = 1.0, top_k: int = 0, top_p: float = 1.0) -> SamplingParams:
    return SamplingParams(max_tokens=1, temperature=temperature, top_k=top_k, top_p=top_p)


def draws_of(sampling: Sequence[SamplingParams], numbers: Sequence[float]) -> Draws | None:
    """Of a batch whose row i asks for `sampling[i]` and has the uniform number `numbers[i]`."""
    drawn = [row for row, p in enumerate(sampling) if p.temperature > 0]
    drawn.sort(key=lambda row: sampling[row].top_k > 0 or sampling[row].top_p < 1)
    if not drawn:
        return None
    return Draws(
        rows=torch.tensor(drawn),
        uniform=torch.tensor([numbers[row] for row in drawn], dtype=torch.float64),
        temperature=torch.tensor([sampling[row].temperature for row in drawn], dtype=torch.float64),
        top_k=torch.tensor([sampling[row].top_k for row in drawn], dtype=torch.int32),
        top_p=torch.tensor([sampling[row].top_p for row in drawn], dtype=torch.float64),
        n_unfiltered=sum(sampling[row].top_k == 0 and sampling[row].top_p == 1 for row in drawn),
    )


def draw_at(logits: torch.Tensor, sampling: SamplingParams, numbers: Sequence[float]) -> list[int]:
    """What the given uniform numbers lead to."""
    n = len(numbers)
    return sample(logits.expand(n, -1), draws_of([sampling] * n, numbers)).tolist()


def draw(logits: torch.Tensor, sampling: SamplingParams, n: int, seed: int = 7) -> list[int]:
    """The first `n` output tokens of one request whose logits are always the same."""
    return draw_at(logits, sampling, uniforms([seed] * n, range(n)).tolist())


@pytest.mark.parametrize(
    ("sampling", "kept"),
    [
        (params(temperature=0.7), list(range(10))),
        (params(temperature=1.6), list(range(10))),
        (params(top_k=3), [3, 9, 0]),
        (params(top_p=0.88), [3, 9, 0, 6, 2, 8]),
    ],
)
def test_draws_follow_the_softmax_over_the_tokens_kept(sampling: SamplingParams, kept: list[int]) -> None:
    n = 20_000
    counts = np.bincount(draw(LOGITS, sampling, n), minlength=10)
    weights = np.exp(LOGITS.double().numpy()[kept] / sampling.temperature)
    expected = n * weights / weights.sum()
    assert counts.sum() == counts[kept].sum() == n
    assert ((counts[kept] - expected) ** 2 / expected).sum() < CHI_SQUARE_999[len(kept) - 1]


@pytest.mark.parametrize("top_k", [0, 1, 5, 200])
@pytest.mark.parametrize("top_p", [0.05, 0.6, 0.95, 1.0])
def test_the_filtered_distribution_is_that_of_transformers(top_k: int, top_p: float) -> None:
    logits = torch.randn(60, generator=torch.Generator().manual_seed(3)).double() * 2
    warped = TemperatureLogitsWarper(0.8)(torch.empty(0), logits[None])
    if top_k:
        warped = TopKLogitsWarper(top_k)(torch.empty(0), warped)
    if top_p < 1:
        warped = TopPLogitsWarper(top_p)(torch.empty(0), warped)
    n = 20_000
    grid = [(i + 0.5) / n for i in range(n)]
    drawn = np.bincount(draw_at(logits, params(0.8, top_k, top_p), grid), minlength=60) / n
    np.testing.assert_allclose(drawn, warped[0].softmax(-1).numpy(), atol=1.01 / n)


def test_a_draw_does_not_depend_on_what_shares_the_batch() -> None:
    rng = np.random.default_rng(0)
    n = 64
    logits = torch.from_numpy(rng.normal(size=(n, 50)) * 2)
    kinds = [params(0.0), params(1.0), params(0.7, top_k=8), params(1.3, top_p=0.8), params(1.0, top_k=20, top_p=0.9)]
    sampling = [kinds[i % len(kinds)] for i in range(n)]
    numbers = rng.random(n).tolist()
    together = sample(logits, draws_of(sampling, numbers)).tolist()
    for part in np.array_split(rng.permutation(n), 9):
        rows = part.tolist()
        draws = draws_of([sampling[i] for i in rows], [numbers[i] for i in rows])
        assert sample(logits[rows], draws).tolist() == [together[i] for i in rows]
    assert together != logits.argmax(-1).tolist()


def test_numbers_change_the_draws() -> None:
    assert draw(LOGITS, params(), 50, seed=1) == draw(LOGITS, params(), 50, seed=1)
    assert draw(LOGITS, params(), 50, seed=1) != draw(LOGITS, params(), 50, seed=2)


def test_without_draws_every_row_takes_the_likeliest() -> None:
    logits = torch.randn(5, 30, generator=torch.Generator().manual_seed(1))
    assert sample(logits, None).tolist() == logits.argmax(-1).tolist()
    assert sample(torch.empty(0, 30), None).tolist() == []


def test_only_the_rows_that_ask_for_it_are_drawn() -> None:
    """The number is at the very end, so that a draw cannot be the likeliest token."""
    logits = torch.tensor([3.0, 2.0, 1.0]).expand(4, -1)
    sampling = [params(0.0), params(), params(0.0), params(top_k=2)]
    assert sample(logits, draws_of(sampling, [ALMOST_ONE] * 4)).tolist() == [0, 2, 0, 1]


@pytest.mark.parametrize("sampling", [params(top_k=1), params(top_p=1e-9), params(1e-300)])
def test_the_likeliest_token_alone_is_left_at_the_extremes(sampling: SamplingParams) -> None:
    assert draw(LOGITS, sampling, 200) == [3] * 200


def test_a_top_k_beyond_the_vocabulary_keeps_every_token() -> None:
    assert set(draw(LOGITS, params(3.0, top_k=1000), 2000)) == set(range(10))


def test_equal_logits_are_kept_in_the_order_of_their_ids() -> None:
    assert set(draw(torch.zeros(40), params(top_k=2), 300)) == {0, 1}


@pytest.mark.parametrize("sampling", [params(), params(top_k=6), params(top_p=0.9)])
def test_a_token_of_no_probability_is_never_drawn(sampling: SamplingParams) -> None:
    logits = torch.tensor([-torch.inf, 0.3, 0.1, 0.2, -torch.inf, -torch.inf])
    assert set(draw_at(logits, sampling, [0.0, 0.5, ALMOST_ONE])) <= {1, 2, 3}


def test_uniform_numbers_walk_through_the_tokens_in_order() -> None:
    logits = torch.tensor([0.25, 0.5, 0.25], dtype=torch.float64).log()
    assert draw_at(logits, params(), [0.0, 0.2, 0.3, 0.7, 0.8, ALMOST_ONE]) == [0, 0, 1, 1, 2, 2]


@pytest.mark.parametrize("sampling", [params(), params(top_k=3)])
def test_logits_that_overflowed_yield_some_token(sampling: SamplingParams) -> None:
    tokens = draw_at(torch.full((7,), torch.nan), sampling, [0.0, 0.5, ALMOST_ONE])
    assert set(tokens) <= set(range(7))
