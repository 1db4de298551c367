"""The knobs chosen for an outlook, held against the batches that the batching rule makes of all knobs."""

import math

import msgspec
import numpy as np
import pytest

from engine.batching import STALL_FREE, Limits, RequestArrays, empty_plan, form_batch
from envs.batch_choice import AS_PROFILED, LEAST_SIZE, MOST_SIZE, SHARES, BatchChooser, Choice
from envs.outlook import Outlook
from envs.step_time import StepTimeModel

TILE, MOST = 16, 8192
MODEL = StepTimeModel.from_formula(
    (4.71e-3, 7.3e-6, 35e-9), (1.27e-3, 20.9e-6, 45.5e-9, 1.045e-9, 0.28e-3)
)  # an H200 with a model of 7e9 parameters
CHOOSER = BatchChooser(MODEL.coefficients, TILE, MOST)
SEATS = 1200
LIMIT_S = 0.04


def outlook(decodes: int, *prompts: tuple[int, int], behind: int = 0, each: int = 0, context: int = 1000) -> Outlook:
    listed = np.array(prompts, np.float64).reshape(-1, 2)
    return Outlook(decodes, decodes * context, listed, behind, behind * each)


def batch_s(state: Outlook, budget: int, chunk: int, newcomers: int = 0, model: StepTimeModel = MODEL) -> float:
    """Mean seconds of the batch that the rule forms, should `newcomers` with endless prompts have come.

    The listed prompts wait; where one has context the prefix cache holds it.
    """
    each = state.behind_tokens // max(state.behind_requests, 1)
    prompts = [*state.prompts, *[(each, 0)] * state.behind_requests, *[(10 * MOST, 0)] * newcomers]
    n = state.decodes + len(prompts)
    ends = np.array([1] * state.decodes + [remaining + start for remaining, start in prompts])
    starts = np.array([1] * state.decodes + [start for _, start in prompts])
    zeros = np.zeros(n, np.int64)
    requests = RequestArrays(starts, ends + 10, ends, zeros + 10**6, zeros, starts, zeros)
    plan, running, waiting = empty_plan(SEATS), np.arange(state.decodes), np.arange(state.decodes, n)
    limits = Limits(SEATS, MOST, 1, TILE, 1, 1)
    n_decodes, n_prefills, n_admitted, _ = form_batch(
        STALL_FREE, budget, chunk, False, 10**6, running, waiting, requests, limits, plan
    )
    rows = slice(n_decodes, n_decodes + n_prefills + n_admitted)
    chunks, contexts = plan.tokens[rows], starts[plan.slots[rows]]
    attention = float(np.sum(chunks * (contexts + 0.5 * chunks)))
    return model.mean_s(n_decodes, state.decode_context_tokens, len(chunks), int(chunks.sum()), attention)


def choose(state: Outlook, limit_s: float, share: bool = False) -> Choice:
    return CHOOSER.choose(state, limit_s, AS_PROFILED, share=share)


def random_outlook(rng: np.random.Generator, behind: bool) -> Outlook:
    lengths = np.exp(rng.uniform(np.log(5), np.log(20_000), rng.integers(0, 17))).astype(int)
    prompts = [(int(n), int(rng.integers(1, 30_000) * rng.integers(0, 2))) for n in lengths]
    n_behind = int(rng.integers(0, 40)) if behind else 0
    return outlook(int(rng.integers(0, 256)), *prompts, behind=n_behind, each=int(rng.integers(50, 3000)))


def test_the_budget_is_the_largest_whole_tile_whose_batch_fits_newcomers_included() -> None:
    rng = np.random.default_rng(0)
    chosen = []
    for _ in range(100):
        state, limit_s = random_outlook(rng, behind=False), float(rng.uniform(0.008, 0.1))
        budget, chunk, step_s = choose(state, limit_s)
        fits = [b for b in range(TILE, MOST + 1, TILE) if batch_s(state, b, b, newcomers=1) <= limit_s]
        assert budget == max(fits, default=0), state
        assert chunk == budget
        if budget:
            assert step_s == pytest.approx(batch_s(state, budget, chunk), rel=1e-9)
        chosen.append(budget)
    assert len(set(chosen)) > 60
    assert 0 in chosen or min(chosen) < 100


def test_prompts_that_are_only_counted_are_taken_to_be_alike() -> None:
    """The batch is never longer than the limit, and at most three tiles more would have fitted: the last of them."""
    rng = np.random.default_rng(1)
    for _ in range(60):
        state, limit_s = random_outlook(rng, behind=True), float(rng.uniform(0.008, 0.1))
        budget, _, step_s = choose(state, limit_s)
        more = min(budget + 4 * TILE, MOST)
        assert batch_s(state, more, more, newcomers=1) > limit_s or budget == MOST
        if budget:
            assert batch_s(state, budget, budget, newcomers=1) <= limit_s
            assert batch_s(state, budget, budget) <= step_s * (1 + 1e-9)


def test_with_shares_too_the_budget_is_the_largest_whose_batch_fits() -> None:
    rng = np.random.default_rng(2)
    shared = 0
    for _ in range(100):
        state, limit_s = random_outlook(rng, behind=False), float(rng.uniform(0.008, 0.1))
        budget, chunk, step_s = choose(state, limit_s, share=True)
        if chunk == budget:
            assert (budget, chunk, step_s) == choose(state, limit_s)
            continue
        shared += 1
        assert batch_s(state, budget, chunk, newcomers=9) <= limit_s
        assert step_s == pytest.approx(batch_s(state, budget, chunk), rel=1e-9)
        tokens = budget - state.decodes
        shares = [n for n in (2, 4, 8) if chunk == max(tokens // n // TILE, 1) * TILE]
        wider = budget + 2 * TILE
        chunks = [max((wider - state.decodes) // n // TILE, 1) * TILE for n in shares]
        assert shares and max(shares) <= SHARES
        # The last newcomer's chunk counts as a whole one.
        slack_s = 1.045e-9 * chunk**2 / 8
        assert any(batch_s(state, wider, c, newcomers=9) > limit_s - slack_s for c in chunks)
    assert shared > 20


@pytest.mark.parametrize("n", [1, 2, 8, 16])
@pytest.mark.parametrize("prompt", [(20, 0), (300, 0), (3000, 0), (20_000, 50_000)])
def test_one_prompt_and_equal_prompts_are_served_one_after_the_other(n: int, prompt: tuple[int, int]) -> None:
    choice = choose(outlook(50, *[prompt] * n, behind=50 if n == 16 else 0, each=prompt[0]), LIMIT_S, share=True)
    assert choice.chunk_tokens == choice.budget_tokens > 500


@pytest.mark.parametrize("shorts", [1, 6])
@pytest.mark.parametrize("context", [0, 20_000])
def test_short_prompts_are_let_past_a_long_one_under_way(shorts: int, context: int) -> None:
    state = outlook(50, (20_000, context), *[(300, 0)] * shorts)
    budget, chunk, step_s = choose(state, LIMIT_S, share=True)
    assert chunk <= budget / 2
    assert budget - 50 - chunk >= 300, "room for a short one beside it"
    assert step_s <= LIMIT_S
    alone = choose(state, LIMIT_S)
    assert alone.chunk_tokens == alone.budget_tokens, "unless chunks may not be small"


def test_prompts_do_not_share_a_batch_where_their_pieces_cost_more_than_they_gain() -> None:
    """Those that wait all feel what each piece costs; where a piece costs nothing, sharing is free."""
    state = outlook(50, (1300, 0), *[(50, 0)] * 15)
    free_pieces = StepTimeModel.from_formula(
        (4.71e-3, 7.3e-6, 35e-9), (1.27e-3, 20.9e-6, 45.5e-9, 1.045e-9, 0.0)
    ).coefficients
    dear = choose(state, LIMIT_S, share=True)
    free = BatchChooser(free_pieces, TILE, MOST).choose(state, LIMIT_S, AS_PROFILED, share=True)
    assert dear.chunk_tokens == dear.budget_tokens
    assert free.chunk_tokens < free.budget_tokens / 2


def test_without_a_limit_everything_fits() -> None:
    assert choose(outlook(0, (20_000, 0)), math.inf, share=True)[:2] == (MOST, MOST)
    assert choose(outlook(200, (20_000, 90_000), behind=9, each=7), math.inf).budget_tokens == MOST


@pytest.mark.parametrize("limit_s", [0.003, 0.0, -1.0, math.nan])
@pytest.mark.parametrize("state", [outlook(50, (20_000, 0)), outlook(250, (90, 0), (80, 0)), outlook(50)])
def test_where_no_batch_fits_the_budget_is_0(state: Outlook, limit_s: float) -> None:
    assert choose(state, limit_s, share=True)[:2] == (0, 0)


def test_without_prompts_the_budget_is_for_one_that_may_come() -> None:
    budget, chunk, step_s = choose(outlook(50), LIMIT_S, share=True)
    assert budget == chunk
    assert batch_s(outlook(50), budget, budget, newcomers=1) <= LIMIT_S < batch_s(outlook(50), budget + TILE, MOST, 1)
    assert step_s == pytest.approx(MODEL.mean_s(50, 50_000, 0, 0, 0.0)), "of what is known to wait"


def test_a_slower_machine_gets_the_budget_of_a_slower_profile() -> None:
    state = outlook(50, (20_000, 3000), (500, 0))
    slow = BatchChooser(MODEL.scaled(1.4).coefficients, TILE, MOST).choose(state, LIMIT_S, AS_PROFILED, share=True)
    factors, offsets = AS_PROFILED
    followed = CHOOSER.choose(state, LIMIT_S, (1.4 * factors, offsets), share=True)
    assert followed[:2] == slow[:2]
    assert followed.step_s == pytest.approx(slow.step_s)
    only_attention = CHOOSER.choose(state, LIMIT_S, (np.array([1.0, 1.0, 1.0, 3.0]), offsets), share=False)
    assert slow.budget_tokens < only_attention.budget_tokens < choose(state, LIMIT_S).budget_tokens


def test_the_seconds_of_a_budget_are_those_of_what_is_known_to_wait() -> None:
    rng = np.random.default_rng(3)
    for _ in range(50):
        state, budget = random_outlook(rng, behind=False), int(rng.integers(1, MOST // TILE)) * TILE
        assert CHOOSER.step_s(state, budget, AS_PROFILED) == pytest.approx(batch_s(state, budget, budget), rel=1e-9)


UNEVEN = StepTimeModel(
    msgspec.structs.replace(
        MODEL.description,
        mixed=msgspec.structs.replace(
            MODEL.description.mixed,
            size_factors=tuple((1 + 0.1 * np.random.default_rng(4).random(128)).tolist()),
        ),
    )
)


def test_of_uneven_sizes_one_that_computes_more_a_second_is_taken_where_prompts_fill_it() -> None:
    chooser, rng, better = BatchChooser(UNEVEN.coefficients, TILE, MOST), np.random.default_rng(5), 0
    for _ in range(40):
        state, limit_s = outlook(int(rng.integers(1, 100)), (30_000, 0)), float(rng.uniform(0.015, 0.04))
        budget, chunk, step_s = chooser.choose(state, limit_s, AS_PROFILED, share=False)
        assert budget == chunk
        assert step_s == pytest.approx(batch_s(state, budget, budget, model=UNEVEN), rel=1e-9)
        assert step_s <= limit_s
        even = chooser.choose(state, limit_s, AS_PROFILED, share=False, even=True).budget_tokens
        assert batch_s(state, even, even, model=UNEVEN) <= limit_s
        assert batch_s(state, even + TILE, even + TILE, model=UNEVEN) > limit_s
        fits = [b for b in range(TILE, MOST + 1, TILE) if batch_s(state, b, b, model=UNEVEN) <= limit_s]
        near = [b for b in fits if LEAST_SIZE * even < b <= max(MOST_SIZE * even, even)]
        rates = {b: (b - state.decodes) / batch_s(state, b, b, model=UNEVEN) for b in near}
        # The longer a first chunk, the more attention each of its tokens takes: some percent between these sizes.
        assert rates[budget] >= 0.98 * max(rates.values())
        assert rates[budget] >= 0.99 * rates[even]
        better += rates[budget] > 1.01 * rates[even]
        little = outlook(state.decodes, (50, 0))
        whole = chooser.choose(little, limit_s, AS_PROFILED, share=False).budget_tokens
        ends = [batch_s(little, b, b, newcomers=1, model=UNEVEN) for b in (whole, whole + TILE)]
        assert ends[0] <= limit_s < ends[1], "nothing to fill it"
    assert better > 10


def test_even_microbatches_are_shared_only_by_prompts_that_fill_them() -> None:
    few, many = outlook(7, (35, 0), (22_000, 0)), outlook(7, (22_000, 0), *[(500, 0)] * 4)
    for state, shared in ((few, False), (many, True)):
        free, even = (CHOOSER.choose(state, LIMIT_S, AS_PROFILED, share=True, even=e) for e in (False, True))
        assert free.chunk_tokens < free.budget_tokens
        assert (even.chunk_tokens < even.budget_tokens) == shared
        assert even.step_s > 0.9 * LIMIT_S
    assert CHOOSER.choose(few, LIMIT_S, AS_PROFILED, share=True).step_s < 0.7 * LIMIT_S, "it ends early"


def test_of_uneven_sizes_no_batch_takes_longer_than_it_may() -> None:
    """Also where the prompts do not quite fill the budget, and the smaller batch is of a size that takes longer."""
    chooser, rng, short = BatchChooser(UNEVEN.coefficients, TILE, MOST), np.random.default_rng(6), 0
    for _ in range(500):
        limit_s, decodes = float(rng.uniform(0.015, 0.04)), int(rng.integers(1, 100))
        whole = chooser.choose(outlook(decodes, (30_000, 0)), limit_s, AS_PROFILED, share=False).budget_tokens
        state = outlook(
            decodes, (max(int(rng.uniform(0.8, 1.2) * whole) - decodes, 1), 0), (int(rng.integers(1, 99)), 0)
        )
        for share in (False, True):
            budget, chunk, step_s = chooser.choose(state, limit_s, AS_PROFILED, share=share)
            assert step_s <= limit_s
            assert batch_s(state, budget, chunk, model=UNEVEN) <= limit_s * (1 + 1e-9)
            short += state.prompt_tokens < budget - decodes
    assert short > 100
