"""Where laws are judged: the fifteen cells of the design, three workloads that shift, and the plant under them all.

A cell's requests arrive at any rate. A workload that shifts is asked for at a share of capacity instead: 1 is where
each of its phases, or its peak, comes at the capacity of clairvoyance for that kind of requests alone.
"""

import argparse
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import msgspec
import numpy as np

from benchmarks.capacity_table import DECODE_ONLY_S, MAX_PROMPT_TOKENS, MIXED_S, NOISE, REQUESTS, SLOS_MS, TABLE
from benchmarks.tuning_table import PRESETS, requests
from engine.config import EngineConfig
from envs.simulator import Plant
from envs.slo import Slo
from envs.step_time import StepTimeModel
from envs.trace import Lengths, Workload, make_workload, read_csv
from envs.workload import FloatArray, IntArray
from profiles.capacity import Load, rough_capacity
from profiles.tune_flags import Capacities

CONVERSATION, LONG_PROMPTS = "azure conv", "mooncake conv"
ALTERNATING, DAY, FLASH_CROWD = "alternating", "day", "flash crowd"
SHIFTING, SHIFTING_SLO_MS = (ALTERNATING, DAY, FLASH_CROWD), 40
PHASE_S, CYCLES = 60.0, 4
DAY_S, DAY_PARTS, DAY_PEAK = 1200.0, 240, 1.8  # the peak is so many times the mean
CROWD_S, CROWD_STARTS_S, CROWD_RUN_S, CROWD_RATE, CROWD_BASE = 30.0, 200.0, 600.0, 3.0, 0.6
QUICK_REQUESTS, QUICK_TIME = 400, 0.25
POOL = 20_000  # lengths drawn from a preset, for workloads that shift


class Cell(NamedTuple):
    """A workload under a TBT SLO."""

    workload: str
    slo_ms: int

    @property
    def slo(self) -> Slo:
        return Slo(tbt_s=self.slo_ms / 1e3)

    @property
    def shifting(self) -> bool:
        return self.workload in SHIFTING

    @property
    def guess(self) -> float:
        """A capacity to begin a search from."""
        return 1.0 if self.shifting else TABLE[self.workload].best_static[SLOS_MS.index(self.slo_ms)]


STEADY_CELLS = [Cell(name, slo_ms) for name in TABLE for slo_ms in SLOS_MS]
SHIFTING_CELLS = [Cell(name, SHIFTING_SLO_MS) for name in SHIFTING]


@dataclass(frozen=True, slots=True, eq=False)
class Shifting:
    """Requests whose rate and lengths change with time. A rate scales the rates; the changes stay where they are.

    From `edges_s[i]` to the next they come at `rates[i]` times the rate asked for, lengths drawn from
    `lengths[kinds[i]]`. Arrivals are those of one Poisson process of rate 1, carried through the inverse of the
    integrated rate, so a seed's n-th request of a kind is the same at any rate. Shapes [n + 1], [n], [n].
    """

    edges_s: FloatArray
    rates: FloatArray
    kinds: IntArray
    lengths: tuple[Lengths, ...]
    seed: int

    @classmethod
    def steady(cls, rate: float, run_s: float, lengths: Lengths, seed: int) -> "Shifting":
        """Without a shift: requests for a time, not a number of them."""
        return cls(np.array([0.0, run_s]), np.array([rate]), np.array([0]), (lengths,), seed)

    def at_rate(self, rate: float) -> Workload:
        """Raises ValueError if so few are expected that there might be none."""
        expected = np.concatenate(([0.0], np.cumsum(np.diff(self.edges_s) * self.rates * rate)))
        if expected[-1] < 20:
            raise ValueError(f"at rate {rate:.3g} only {expected[-1]:.1f} requests are expected: ask for a higher one")
        enough = int(expected[-1] + 10 * expected[-1] ** 0.5)
        points = np.cumsum(np.random.default_rng([self.seed, 0]).exponential(size=enough))
        points = points[points < expected[-1]]
        # A pause has no inverse: of the times at which the integral stands still, interp gives the last.
        arrival_s = np.interp(points, expected, self.edges_s)
        kind = self.kinds[np.clip(np.searchsorted(self.edges_s, arrival_s, "right") - 1, 0, len(self.kinds) - 1)]
        prompts, outputs = np.empty((2, len(points)), np.int64)
        for i, pool in enumerate(self.lengths):
            of_kind = np.flatnonzero(kind == i)
            rows = np.random.default_rng([self.seed, 1 + i]).integers(len(pool), size=len(of_kind))
            prompts[of_kind], outputs[of_kind] = pool.prompt_tokens[rows], pool.output_tokens[rows]
        return Workload(arrival_s, prompts, outputs)


@dataclass(frozen=True, slots=True)
class Setting:
    """What all laws are judged on: the plant's noise, and public traces (a folder) or this repository's presets.

    The plant is the design's or, with a `profile`, another engine: its step time, noise and capacities. Lengths are
    drawn times `scale`, and within what the engine takes.
    """

    traces: Path | None = None
    quick: bool = False
    noise: float = NOISE
    profile: Path | None = None
    scale: float = 1.0

    @classmethod
    def of(cls, args: argparse.Namespace) -> "Setting":
        return cls(args.traces, args.quick, args.noise)

    def step_time(self) -> StepTimeModel:
        if self.profile is not None:
            return StepTimeModel.load(self.profile)
        return StepTimeModel.from_formula(DECODE_ONLY_S, MIXED_S).with_noise(self.noise)

    def plant(self, dead_time: int = 1) -> Plant:
        told: dict[str, Any] = {"max_requests": 256, "max_budget_tokens": 8192, "max_model_tokens": 2**17}
        told |= {"kv_blocks": 880_000 // 16}
        if self.profile is not None:
            told = msgspec.structs.asdict(Capacities.of(self.profile))
        return Plant(EngineConfig(**told), self.step_time(), dead_time, reserve_output=True)

    def guess(self, cell: Cell) -> float:
        """A capacity to begin a search from."""
        if cell.shifting or self.profile is None:
            return cell.guess
        return rough_capacity(self.plant(), self.load(cell, 0, {}).at_rate(1.0))

    def load(self, cell: Cell, seed: int, capacities: Mapping[Cell, float]) -> Load:
        """The cell's requests. One that shifts needs the `capacities` (req/s) of what it is made of, for its rate 1."""
        if not cell.shifting:
            return self._steady(cell.workload, QUICK_REQUESTS if self.quick else REQUESTS, seed)
        conversation, long_prompts = (capacities[Cell(name, cell.slo_ms)] for name in (CONVERSATION, LONG_PROMPTS))
        if cell.workload == ALTERNATING:
            return self.shifting([(PHASE_S, conversation, 0), (PHASE_S, long_prompts, 1)] * CYCLES, seed)
        if cell.workload == DAY:
            return self.shifting(day(conversation, DAY_S, DAY_PARTS), seed)
        calm = CROWD_BASE * conversation
        after_s = CROWD_RUN_S - CROWD_STARTS_S - CROWD_S
        return self.shifting(
            [(CROWD_STARTS_S, calm, 0), (CROWD_S, CROWD_RATE * conversation, 0), (after_s, calm, 0)], seed
        )

    def _steady(self, workload: str, n: int, seed: int) -> Workload:
        drawn = requests(self.traces, workload, n, seed)
        longest = self.plant().config.max_model_tokens
        prompts, outputs = (
            np.maximum(np.rint(self.scale * tokens), 1).astype(np.int64)
            for tokens in (drawn.prompt_tokens, drawn.output_tokens)
        )
        fits = prompts + outputs <= longest
        return Workload(drawn.arrival_s[fits], prompts[fits], outputs[fits])

    def _within(self, drawn: Lengths) -> Lengths:
        fits = drawn.prompt_tokens + drawn.output_tokens <= self.plant().config.max_model_tokens
        return Lengths(drawn.prompt_tokens[fits], drawn.output_tokens[fits])

    def shifting(self, phases: list[tuple[float, float, int]], seed: int) -> Shifting:
        """From phases of (seconds, requests per second at rate 1, 0 for conversation and 1 for long prompts)."""
        durations_s, rates, kinds = zip(*phases, strict=True)
        edges_s = np.cumsum((0.0, *durations_s)) * (QUICK_TIME if self.quick else 1.0)
        pools = (self._within(lengths(self.traces, name)) for name in (CONVERSATION, LONG_PROMPTS))
        return Shifting(edges_s, np.array(rates), np.array(kinds), tuple(pools), seed)


def day(peak_rate: float, day_s: float, parts: int) -> list[tuple[float, float, int]]:
    """Conversation over a day, as phases of one length: quietest where it starts, busiest in the middle."""
    middle = (np.arange(parts) + 0.5) / parts
    rates = peak_rate * (1 - (DAY_PEAK - 1) * np.cos(2 * np.pi * middle)) / DAY_PEAK
    return [(day_s / parts, rate, 0) for rate in rates.tolist()]


@cache
def lengths(traces: Path | None, name: str) -> Lengths:
    """What a workload's requests are drawn from, prompts under `MAX_PROMPT_TOKENS`."""
    if traces is None:
        rng = np.random.default_rng(0)
        drawn = make_workload("poisson:1", PRESETS[name], rng, POOL, MAX_PROMPT_TOKENS)
        return Lengths(drawn.prompt_tokens, drawn.output_tokens)
    pool = read_csv(traces / TABLE[name].file)
    fits = pool.prompt_tokens < MAX_PROMPT_TOKENS
    return Lengths(pool.prompt_tokens[fits], pool.output_tokens[fits])


def parser(description: str | None, out: str) -> argparse.ArgumentParser:
    """The flags that all benchmarks of the laws have."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--traces", type=Path, help="folder of the five public workloads (without: presets)")
    parser.add_argument("--out", type=Path, default=Path("pacer-out") / out, help="what was done is kept here")
    parser.add_argument("--quick", action="store_true", help="fewer requests: capacities come out higher")
    parser.add_argument("--policies", nargs="*", default=["predictive", "pid"], metavar="LAW", help="laws to judge")
    parser.add_argument("--dead-times", type=int, nargs="+", default=[1, 2], metavar="ITERATIONS")
    parser.add_argument("--seed", type=int, default=0, help="the first one")
    parser.add_argument("--seeds", type=int, default=3, help="how many")
    noise = "of the design's step times (default %(default)s); a profile has its own"
    parser.add_argument("--noise", type=float, default=NOISE, help=noise)
    return parser
