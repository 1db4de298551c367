"""From a batch of requests to plain arrays: every token, every draw, known or still on the device."""

from dataclasses import dataclass, field, replace

import numpy as np
import pytest
from paged import Paged, make_request

from engine.config import EngineConfig
from engine.philox import uniform
from engine.request import Batch, Request, SamplingParams, StepResult
from engine.step_input import StepInput, even_step, step_input

CONFIG = EngineConfig(
    max_budget_tokens=256, max_requests=8, max_model_tokens=64, block_tokens=4, kv_blocks=8 * 16, min_budget_tokens=1
)
SAMPLING = [
    SamplingParams(9),
    SamplingParams(12, temperature=0.7),
    SamplingParams(5, temperature=1.0, top_k=4),
    SamplingParams(7, temperature=1.3, top_p=0.9),
]


def token_of(request: Request, position: int) -> int:
    """What stands at a position of a request, whoever asks and whenever."""
    return (int(request.id) * 1009 + position * 31) % 100_003


@dataclass
class Checker:
    """A runner that yields `token_of`, and compares every step with a reference that goes token by token."""

    steps: list[StepInput] = field(default_factory=list)
    in_flight: list[Batch] = field(default_factory=list)  # the batch before, done or not
    previous_tokens: list[int] = field(default_factory=list)
    unknown: int = 0

    def launch(self, batch: Batch) -> "Checker.Done":
        step = step_input(batch, self.in_flight)
        self.check_tokens(batch, step)
        self.check_draws(batch, step)
        assert step.n_decodes == batch.n_decodes
        assert step.n_tokens.tolist() == batch.n_tokens.tolist()
        assert step.context.tolist() == batch.context.tolist()
        assert {a.dtype for a in (step.n_tokens, step.context, step.token_ids, step.sampled_rows)} == {np.dtype("i4")}
        rows = step.sampled_rows.tolist()
        assert rows == [row for row, samples in enumerate(batch.samples) if samples]
        ends = batch.context + batch.n_tokens
        self.in_flight = [batch]
        self.previous_tokens = [token_of(batch.requests[row], int(ends[row])) for row in rows]
        self.steps.append(step)
        return self.Done(StepResult(self.previous_tokens, 0.0, ()))

    @dataclass
    class Done:
        answer: StepResult

        def result(self) -> StepResult:
            return self.answer

    def check_tokens(self, batch: Batch, step: StepInput) -> None:
        expected, positions = [], []
        for request, context, n in zip(batch.requests, batch.context.tolist(), batch.n_tokens.tolist(), strict=True):
            positions += range(context, context + n)
            expected += [token_of(request, position) for position in range(context, context + n)]
        ids = step.token_ids.tolist()
        self.unknown += sum(token < 0 for token in ids)
        assert [self.previous_tokens[-1 - token] if token < 0 else token for token in ids] == expected
        assert step.positions.tolist() == positions

    def check_draws(self, batch: Batch, step: StepInput) -> None:
        expected = {}
        for place, row in enumerate(step.sampled_rows.tolist()):
            request = batch.requests[row]
            position = int(batch.context[row] + batch.n_tokens[row]) - request.n_prompt
            number = np.random.Generator(np.random.Philox(key=request.seed, counter=position)).random()
            p = request.sampling
            if p.temperature > 0:
                expected[place] = (number, p.temperature, p.top_k, p.top_p)
        if not expected:
            assert step.drawn is None
            return
        drawn = step.drawn
        assert drawn is not None
        rows = drawn.rows.tolist()
        parts = (drawn.uniform.tolist(), drawn.temperature.tolist(), drawn.top_k.tolist(), drawn.top_p.tolist())
        assert dict(zip(rows, zip(*parts, strict=True), strict=True)) == expected
        filtered = [expected[place][2] > 0 or expected[place][3] < 1 for place in rows]
        assert filtered == [False] * drawn.n_unfiltered + [True] * (len(rows) - drawn.n_unfiltered)


def requests(n: int) -> list[Request]:
    lengths = np.random.default_rng(4).integers(1, 40, n).tolist()
    made = [make_request(str(i), [0] * length, SAMPLING[i % len(SAMPLING)]) for i, length in enumerate(lengths)]
    for request in made:
        request.token_ids = [token_of(request, position) for position in range(request.n_prompt)]
    return made


@pytest.mark.parametrize("depth", [1, 2])
@pytest.mark.parametrize(("budget_tokens", "preempt_every"), [(13, 0), (60, 3), (25, 5)])
def test_steps_hold_what_the_requests_hold_or_will(depth: int, budget_tokens: int, preempt_every: int) -> None:
    checker, work = Checker(), requests(25)
    outputs = Paged(checker, replace(CONFIG, look_ahead=depth == 2)).generate(work, budget_tokens, preempt_every)
    for request, output in zip(work, outputs, strict=True):
        assert output == [token_of(request, request.n_prompt + i) for i in range(request.sampling.max_tokens)]
    decodes = sum(step.n_decodes for step in checker.steps)
    assert (checker.unknown > 0.8 * decodes) if depth == 2 else (checker.unknown == 0)


@pytest.mark.parametrize(("seed", "position"), [(0, 0), (2**64 + 5, 12), (-1, 12), (2**127, 2**31), (77, 1)])
def test_a_uniform_number_is_the_first_of_numpys_philox_at_that_counter(seed: int, position: int) -> None:
    generator = np.random.Generator(np.random.Philox(key=seed % 2**128, counter=position))
    assert uniform(seed, position) == generator.random()


def test_uniform_numbers_differ_by_seed_and_position() -> None:
    assert len({uniform(seed, position) for seed in range(30) for position in range(30)}) == 900


def test_a_meaningless_step_has_the_size_that_was_asked_for() -> None:
    step = even_step(100, 7, block_tokens=4)
    assert len(step.token_ids) == step.n_tokens.sum() == 100
    assert (len(step.n_tokens), step.n_tokens.max() - step.n_tokens.min()) == (7, 1)
    assert step.block_tables.shape == (7, 4)
    assert step.drawn is not None
    assert step.drawn.rows.tolist() == step.sampled_rows.tolist() == list(range(7))
