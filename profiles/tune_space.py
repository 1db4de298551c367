"""What is tuned: the knobs of a static budget, and the parameters of the laws. And the first guess at each.

A static budget has up to three knobs: the budget in whole tiles, the chunk as a share of it, and the most sequences at
once. A law's parameters are those of its constructor, between bounds narrower than it accepts where the rest is
senseless.
"""

import inspect
import itertools
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import numpy as np
from optuna import Trial
from optuna.distributions import FloatDistribution, IntDistribution

from engine.config import EngineConfig
from envs.simulator import Plant
from envs.slo import Slo
from envs.trace import Workload
from envs.workload import FloatArray, IntArray
from policies.catalogue import LAWS
from profiles.tune_flags import FAMILIES, STATIC

Range = IntDistribution | FloatDistribution

LAW_RANGES: dict[str, dict[str, Range]] = {
    "pid": {
        "set_point": FloatDistribution(0.6, 1.0),
        "kp": FloatDistribution(0.0, 1.0),
        "ki": FloatDistribution(0.02, 1.0, log=True),
        "kd": FloatDistribution(0.0, 0.5),
        "window": IntDistribution(16, 2048, log=True),
    },
    "aimd": {
        "backoff": FloatDistribution(0.3, 0.99),
        "probe": IntDistribution(1, 512, log=True),
        "probe_below": FloatDistribution(0.5, 1.0),
    },
    "predictive": {"quantile": FloatDistribution(0.8, 0.9999)},
}
NEARBY = (1.0, 0.85, 1.18, 0.7, 1.4)  # times the guess: the mean load, of which it is made, is not the whole of it
CHUNK_STEP = 1 / 8
DEPTHS = 200


class Candidate(NamedTuple):
    """What one trial runs: a policy as `--policy` takes it, on an engine that runs so many requests at once."""

    policy: str
    max_requests: int

    def on(self, plant: Plant) -> Plant:
        return replace(plant, config=replace(plant.config, max_requests=self.max_requests))


@dataclass(frozen=True)
class Space:
    """The parameters of one law on one engine, each with its range; a range of one value is not searched."""

    law: str
    ranges: Mapping[str, Range]
    config: EngineConfig

    @classmethod
    def of(cls, law: str, config: EngineConfig, budget_only: bool = False) -> "Space":
        """Raises ValueError naming the laws that can be tuned. `budget_only` leaves a static's other knobs alone."""
        if law not in FAMILIES:
            raise ValueError(f"policy {law!r} has nothing to tune: choose from {', '.join(FAMILIES)}")
        if law != STATIC:
            return cls(law, LAW_RANGES[law], config)
        tile = config.tile_tokens
        ranges: dict[str, Range] = {
            "budget_tiles": IntDistribution(
                -(-config.min_budget_tokens // tile), config.max_budget_tokens // tile, log=True
            )
        }
        if not budget_only:
            most = config.max_requests
            ranges["chunk_share"] = FloatDistribution(CHUNK_STEP, 1.0, step=CHUNK_STEP)
            ranges["max_requests"] = IntDistribution(max(1, most // 8), most, log=True)
        return cls(law, ranges, config)

    def suggest(self, trial: Trial) -> dict[str, Any]:
        return {name: _suggest(trial, name, range_) for name, range_ in self.ranges.items()}

    def candidate(self, params: Mapping[str, Any]) -> Candidate:
        if self.law != STATIC:
            given = ",".join(f"{name}={params[name]:.6g}" for name in self.ranges)
            return Candidate(f"{self.law}:{given}", self.config.max_requests)
        tile = self.config.tile_tokens
        budget = params["budget_tiles"] * tile
        chunk = max(int(params.get("chunk_share", 1.0) * budget) // tile * tile, tile, self.config.min_budget_tokens)
        policy = f"static:budget={budget}" + (f",chunk={chunk}" if chunk < budget else "")
        return Candidate(policy, params.get("max_requests", self.config.max_requests))

    def guesses(self, budget_tokens: int) -> list[dict[str, Any]]:
        """Where to begin: a static at and around `budget_tokens` with nothing else limited, a law as it is."""
        if self.law != STATIC:
            defaults = inspect.signature(LAWS[self.law]).parameters
            return [{name: defaults[name].default for name in self.ranges}]
        tiles = self.ranges["budget_tiles"]
        around = (round(factor * budget_tokens / self.config.tile_tokens) for factor in NEARBY)
        budgets = dict.fromkeys(int(np.clip(b, tiles.low, tiles.high)) for b in around)
        most = {name: range_.high for name, range_ in self.ranges.items()}
        return [most | {"budget_tiles": budget} for budget in budgets]

    def grid(self, points: int) -> list[dict[str, Any]]:
        """A full grid of about so many points, evenly spaced (on a logarithmic scale where the range is)."""
        levels = max(2, round(points ** (1 / len(self.ranges))))
        values = [_levels(range_, levels) for range_ in self.ranges.values()]
        return [dict(zip(self.ranges, point, strict=True)) for point in itertools.product(*values)]


def static_knobs(policy: str) -> tuple[int, int]:
    """Budget and chunk of a static that `Space.candidate` wrote, in tokens."""
    values = dict(item.split("=") for item in policy.partition(":")[2].split(","))
    return int(values["budget"]), int(values.get("chunk", values["budget"]))


def guess_budget(plant: Plant, workload: Workload, slo: Slo) -> int:
    """The largest budget, in tokens, whose steps keep the bound on gaps as often as the SLO asks, under a typical load.

    Typical is a full server in balance: of B tokens a step, d are decodes and B - d prompt tokens, and as many requests
    end as begin, so d / output = (B - d) / prompt in means; their context is the mean over all decode steps. The prompt
    tokens are as deep in their prompt as any are, and the step has the model's noise: the bound is kept if no more than
    1 - quantile of all pairs of the two miss it. Without a bound on gaps (tbt, tpot or deadline) there is nothing to
    predict by, and it is the engine's own budget.
    """
    config, bound_s = plant.config, slo.pace_s
    if bound_s is None:
        return config.budget_tokens
    tile, factors = config.tile_tokens, plant.step_time.residuals[1]
    prompts, outputs = workload.prompt_tokens, workload.output_tokens
    context = float((outputs * (prompts + outputs / 2)).sum() / outputs.sum())
    most = min(config.max_requests, config.kv_blocks * config.block_tokens / context)
    depths = _depths(prompts)

    def fits(budget: int) -> bool:
        decodes = min(budget * outputs.sum() / (prompts.sum() + outputs.sum()), most)
        prefill = budget - decodes
        requests = 1 + prefill / prompts.mean()
        means_s = [plant.step_time.mean_s(decodes, decodes * context, requests, prefill, prefill * d) for d in depths]
        return float(np.mean(np.outer(means_s, factors) > bound_s)) <= 1 - slo.quantile

    fitting, beyond = -(-config.min_budget_tokens // tile), config.max_budget_tokens // tile + 1
    while beyond - fitting > 1:  # the lowest, should it not fit either
        middle = (fitting + beyond) // 2
        fitting, beyond = (middle, beyond) if fits(middle * tile) else (fitting, middle)
    return fitting * tile


def _depths(prompts: IntArray) -> FloatArray:
    """How many tokens of its prompt are before a prompt token: `DEPTHS` of them, evenly spread over all tokens."""
    ends = np.cumsum(prompts)
    at = (np.arange(DEPTHS) + 0.5) / DEPTHS * ends[-1]
    which = np.searchsorted(ends, at, side="right")
    return np.asarray(at - (ends - prompts)[which], dtype=np.float64)


def _suggest(trial: Trial, name: str, range_: Range) -> Any:
    if isinstance(range_, IntDistribution):
        return trial.suggest_int(name, range_.low, range_.high, log=range_.log)
    return trial.suggest_float(name, range_.low, range_.high, step=range_.step, log=range_.log)


def _levels(range_: Range, n: int) -> list[Any]:
    spaced = np.geomspace if range_.log else np.linspace
    values = spaced(range_.low, range_.high, n)
    if isinstance(range_, IntDistribution):
        return sorted({round(float(value)) for value in values})
    if range_.step:
        values = range_.low + np.round((values - range_.low) / range_.step) * range_.step
    return sorted({float(np.clip(value, range_.low, range_.high)) for value in values})
