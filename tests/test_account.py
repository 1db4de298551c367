"""The account of late tokens."""

import numpy as np
import pytest

from policies.account import MOST, SAVED, LateAccount

SPARED = 0.01 * (1.0 - SAVED)  # of each token, at the quantile 0.99


def test_every_token_pays_in_and_a_late_one_takes_one_out() -> None:
    account = LateAccount(0.99)
    assert (account.tokens, account.debt) == (0.0, 0.0), "even at the start"
    account.book(50, 0)
    assert account.tokens == pytest.approx(50 * SPARED)
    account.book(50, 0)
    assert account.tokens == pytest.approx(100 * SPARED)
    account.book(50, 3)
    assert account.tokens == pytest.approx(150 * SPARED - 3)


def test_what_may_be_late_is_what_the_quantile_spares_but_for_what_is_saved() -> None:
    """Paying out whatever is there, the share of late tokens comes out as promised."""
    for quantile in (0.9, 0.99, 0.999):
        account, late = LateAccount(quantile), 0
        for _ in range(20_000):
            paid = int(max(account.tokens, 0.0))
            account.book(100, paid)
            late += paid
        assert late / (20_000 * 100) == pytest.approx((1.0 - quantile) * (1.0 - SAVED), rel=0.01)


@pytest.mark.parametrize(("late", "sign"), [(0, 1.0), (200, -1.0)])
def test_neither_is_more_saved_up_nor_owed_than_ten_batches(late: int, sign: float) -> None:
    account = LateAccount(0.99)
    for _ in range(10_000):
        account.book(200, late)
        assert abs(account.tokens) <= MOST * 200 + 1e-6
    assert account.tokens == pytest.approx(sign * MOST * 200)
    assert account.debt == pytest.approx(0.0 if sign > 0 else 1.0)
    account.book(200, 200 - late)
    assert abs(account.tokens) == pytest.approx(MOST * 200 - (200 if sign > 0 else 0), rel=0.01), "and is left at once"


def test_the_debt_is_what_is_owed() -> None:
    account = LateAccount(0.99)
    rng = np.random.default_rng(0)
    seen = []
    for _ in range(2000):
        account.book(100, int(rng.choice([0, 100], p=[0.99, 0.01])))
        seen.append((account.tokens, account.debt))
    tokens, debts = np.array(sorted(seen)).T
    assert tokens[0] < 0 < tokens[-1]
    assert np.all(np.diff(debts) <= 1e-12)
    assert np.all((debts >= 0.0) & (debts <= 1.0))
    assert np.all((debts > 0.0) == (tokens < 0.0)), "none when even"


def test_the_mean_batch_is_that_of_the_first_and_then_follows_slowly() -> None:
    account = LateAccount(0.99)
    account.book(120, 0)
    assert account.mean_tokens == pytest.approx(120)
    account.book(20, 0)
    assert 118 < account.mean_tokens < 120
    for _ in range(5000):
        account.book(20, 0)
    assert account.mean_tokens == pytest.approx(20, rel=0.01)
    for _ in range(5000):
        account.book(0, 0)
    assert account.mean_tokens == 1.0, "it is divided by"
