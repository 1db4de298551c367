"""Predict the step, and give prompts what the promise leaves them."""

import math
from collections import deque
from collections.abc import Callable
from functools import partial
from statistics import NormalDist
from typing import TYPE_CHECKING, ClassVar

from engine.protocol import Telemetry
from envs.batch_choice import CROWDED, BatchChooser, Choice
from envs.machine_speed import LEAST_NOISE, MachineSpeed, iteration_s
from envs.outlook import Outlook, foresee
from envs.slo import Slo
from policies.account import SAVED, LateAccount
from policies.policy import Decision, Iteration, IterationLog
from policies.slack import Slacks

if TYPE_CHECKING:
    from envs.step_time import StepTimeModel

STRICTEST = 0.3  # wider, in logarithms, is the margin when as much is owed as can be
SPREAD = 8.0  # of what the prompts of a pipeline take, a stage's next microbatch has no more than this part
RISE = 16  # microbatches of a pipeline: the time constant at which their time grows to what it may be
SMALL_TOKENS = 256  # however few prompts there are: smaller batches compute fewer tokens a second
LEAST_PACE = 0.5  # of the pace promised: what a request that is behind is helped with


class Predictive:
    """The largest budget whose step keeps the promise, by the step-time model, on the machine as it runs now.

        budget = max { whole tiles b : predicted time of the batch that b makes <= limit * exp(-margin) }

    for the batch that the answer acts on, one dead time ahead (`foresee`); chunks below the budget let short prompts
    past long ones, and where sizes are served unevenly a smaller budget is taken if it computes more tokens a second
    (`BatchChooser`); `MachineSpeed` follows the machine. While nobody decodes, there is no limit.

    tbt: the limit is the bound. The margin m is such that late tokens are as many as the quantile permits (less what is
    `SAVED`), and cost the same wherever they fall. With d decodes in a batch, prompt tokens T, and noise of deviation
    sigma, T - price * d * P(late) is largest where the density of lateness times d is the same for all batches:

        (m / sigma)^2 = z^2 + 2 ln(d / mean d)       P(noise > z sigma) the share of late tokens aimed at

    so where few decodes feel it, more is risked. What was late beyond that share is a debt (`LateAccount`), paid off by
    a wider margin.

    tpot, deadline: the limit is the least slack that any decoding request has when the batch is formed.

    In a pipeline the limit is divided by the stages, as a token passes all of them: microbatches of equal time. Where
    one of them could take all prompts that are there, and the next ones would run without, they are spread:

        limit <= time of the decodes + time of the prompts / (SPREAD * stages), or that of SMALL_TOKENS more if longer

    What a microbatch takes more or less than the one before is a bubble in some stage: their time falls at once where
    it must, and rises slowly, so that it rises and falls less often:

        limit <= before * (limit / before)^(1 / RISE)    before: what the microbatch before was allowed

    Sizes are served in steps, of 128 tokens say, and each microbatch has decodes of its own: where a step more fits one
    of them but not all, the others would wait for it at every turn. So of the largest size that fits and the largest
    that takes no longer than `least` that one is taken whose time is nearer to it:

        least = min over the pipeline's microbatches of the time of the largest size that fits each
    """

    RANGES: ClassVar = {"quantile": (0.5, 0.9999)}

    def __init__(self, first: Telemetry, slo: Slo, step_time: "StepTimeModel", quantile: float = 0.99) -> None:
        assert slo.pace_s is not None, "see check"
        self._pace_s, self._tbt_s = slo.pace_s, slo.tbt_s
        self._chooser = BatchChooser(step_time.coefficients, first.bounds.tile_tokens, first.bounds.max_budget_tokens)
        spared = 1.0 - (1.0 - SAVED) * (1.0 - quantile)
        self._z = NormalDist().inv_cdf(spared)
        self._deviation = max(math.log(step_time.factor(spared, mixed=True)) / self._z, LEAST_NOISE)
        self._speed = MachineSpeed(step_time)
        self._account = LateAccount(quantile)
        self._slacks = _slacks(slo)
        self._log = IterationLog()
        self._stages = 1
        self._turns: deque[Outlook] = deque(maxlen=1)  # of each microbatch of the pipeline
        self._largest_s: deque[float] = deque(maxlen=1)  # what the largest size takes that fits each of them
        self._before_s = math.inf  # allowed to the microbatch before
        in_force = (first.knobs.budget_tokens, first.knobs.chunk_tokens)
        under_way = first.dead_time_iterations - 1
        self._sent = deque([in_force] * under_way, under_way)  # knobs of the iterations in between

    @staticmethod
    def check(slo: Slo) -> None:
        """Raises ValueError for a promise that says nothing of the time between tokens."""
        if slo.pace_s is None:
            raise ValueError(f"predictive needs a bound on the time between tokens, {str(slo)!r} has none: add tbt:MS")

    def decide(self, telemetry: Telemetry) -> Decision:
        for iteration in self._log.completed(telemetry):
            self._learn(iteration)
        if self._slacks:
            self._slacks.update(telemetry)
        decision = self._choose(telemetry, self._next(telemetry))
        self._sent.append((decision.budget_tokens, decision.chunk_tokens))
        return decision

    def track(self, sent: Decision) -> None:
        if self._sent:
            self._sent[-1] = (sent.budget_tokens, sent.chunk_tokens)

    def _next(self, telemetry: Telemetry) -> Outlook:
        """The next batch's state; in a pipeline its decodes are those that had the same turn before."""
        outlook = foresee(telemetry, self._sent)
        self._turns.append(outlook)
        turn = self._turns[0]
        return outlook._replace(decodes=turn.decodes, decode_context_tokens=turn.decode_context_tokens)

    def _choose(self, telemetry: Telemetry, outlook: Outlook) -> Decision:
        bounds, speed, even = telemetry.bounds, self._speed.speed, self._stages > 1
        limited = outlook.decodes > 0 or even  # in a pipeline other microbatches' decodes wait behind it
        limit_s, why = self._limit(telemetry, outlook) if limited else (math.inf, "nobody decodes, no limit")
        if even:
            limit_s, why = self._level(limit_s, why, self._even_s(outlook))
        share = telemetry.kv_usage < CROWDED
        choose = partial(self._chooser.choose, outlook, speed=speed, share=share, even=even)
        budget, chunk, step_s = self._alike(choose, limit_s, outlook) if even else choose(limit_s)
        least = bounds.min_budget_tokens
        machine = f"machine {self._speed.factors[1]:.2f}x its profile"
        return Decision(max(budget, least), max(chunk, least), f"predictive: {1e3 * step_s:.1f} ms, {why}; {machine}")

    def _limit(self, telemetry: Telemetry, outlook: Outlook) -> tuple[float, str]:
        """Seconds that the next microbatch may take on the mean, and why."""
        limit_s, z, debt = self._pace_s, self._z, self._account.debt
        if self._slacks:
            limit_s = self._slack_s(telemetry, self._slacks, outlook.decodes)
            why = f"slack {1e3 * limit_s:.0f} ms"
        else:
            weight = max(outlook.decodes, 1) / self._account.mean_tokens
            z = math.sqrt(max(z * z + 2.0 * math.log(weight), 0.0))
            why = f"{self._account.tokens:+.0f} late tokens to spare"
        sigma = self._deviation * self._speed.noise(mixed=True)
        limit_s *= math.exp(-z * sigma - STRICTEST * debt) / self._stages
        return limit_s, f"{1e3 * limit_s:.1f} allowed, {why}"

    def _level(self, limit_s: float, why: str, even_s: float) -> tuple[float, str]:
        """Seconds that the next microbatch of a pipeline may take beside the others, and why."""
        if even_s < limit_s:
            limit_s, why = even_s, f"{1e3 * even_s:.1f} allowed, prompts spread over {self._stages} stages"
        if limit_s > self._before_s:
            limit_s = self._before_s * (limit_s / self._before_s) ** (1 / RISE)
            why = f"{1e3 * limit_s:.1f} for now, {why}"
        self._before_s = limit_s
        return limit_s, why

    def _alike(self, choose: Callable[[float], Choice], limit_s: float, outlook: Outlook) -> Choice:
        """Of the sizes within the limit the one that takes about as long as those of the other microbatches."""
        largest = choose(limit_s)
        filled = largest.budget_tokens - outlook.decodes < outlook.prompt_tokens
        self._largest_s.append(largest.step_s if filled else limit_s)
        least_s = min(self._largest_s)
        if not filled or largest.step_s <= least_s:
            return largest
        smaller = choose(least_s)
        return smaller if largest.step_s * smaller.step_s > least_s**2 else largest

    def _even_s(self, outlook: Outlook) -> float:
        """Mean seconds of a microbatch beside which the pipeline's others do not run out of prompts.

        Those held up count: they may be begun in it.
        """
        decodes, speed = outlook.decodes, self._speed.speed
        outlook = outlook._replace(
            behind_requests=outlook.behind_requests + outlook.held_requests,
            behind_tokens=outlook.behind_tokens + outlook.held_tokens,
            held_requests=0,
            held_tokens=0,
        )
        whole, small = decodes + outlook.prompt_tokens, decodes + SMALL_TOKENS
        alone_s, whole_s, small_s = (self._chooser.step_s(outlook, n, speed) for n in (decodes, whole, small))
        return max(alone_s + (whole_s - alone_s) / (SPREAD * self._stages), small_s)

    def _slack_s(self, telemetry: Telemetry, slacks: Slacks, decodes: int) -> float:
        """The least slack of those who will decode, when the batch is formed that the answer acts on."""
        ahead, batch = telemetry.dead_time_iterations, telemetry.batch
        least_s = slacks.least_s(telemetry.scheduled_ns, ahead * self._stages)
        if not math.isinf(least_s):
            least_s += ahead * (self._pace_s - self._speed.predicted_s(batch))
        if decodes > batch.decode_tokens:
            least_s = min(least_s, self._pace_s)  # a prompt ends in between, and has no slack yet
        return max(least_s, LEAST_PACE * self._pace_s) if decodes else self._pace_s

    def _learn(self, iteration: Iteration) -> None:
        batch, _, measured, _ = iteration
        if measured.stages and len(measured.stages) != self._stages:
            self._stages = len(measured.stages)
            self._turns, self._largest_s = deque(self._turns, self._stages), deque(self._largest_s, self._stages)
        self._speed.observe(batch, iteration_s(measured))
        if measured.tbt_s and self._tbt_s is not None:
            late = sum(gap_s > self._tbt_s for gap_s in measured.tbt_s) if max(measured.tbt_s) > self._tbt_s else 0
            self._account.book(len(measured.tbt_s), late)


def _slacks(slo: Slo) -> Slacks | None:
    """None for a bound on every gap, which knows no slack."""
    if slo.tbt_s is not None:
        return None
    if slo.deadline_s is not None:
        return Slacks("deadline", slo.deadline_s, slo.ttft_s or 0.0)
    return Slacks("tpot", slo.tpot_s) if slo.tpot_s is not None else None
