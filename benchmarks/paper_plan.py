"""What `benchmarks.paper_pipeline` runs: models on ranks, promises, schedules, and how many requests at once.

Capacities come from the simulator, on the step-time model that was measured on the same ranks. A pipeline is a step
time of its slowest stage there; what hidden states take from stage to stage is not modelled.
"""

from collections.abc import Iterator
from itertools import product
from pathlib import Path
from typing import NamedTuple

import msgspec
import numpy as np

from engine.config import EngineConfig, ModelSource
from envs.simulator import Plant
from envs.slo import Slo
from envs.step_time import StepTimeModel
from envs.trace import Workload, make_workload
from profiles.capacity import Trial
from profiles.parallel import Pool, in_parallel
from profiles.sweep_points import Point

PROMISES = {"strict": 5.0, "relaxed": 25.0}  # P99 TBT in decode iterations, as Sarathi-Serve (OSDI'24) promises it
PREDICTIVE = "predictive"


class Place(NamedTuple):
    """What a kind of machine is given to do: lengths by mix, static budgets, and the decode iteration of promises.

    No request, and so no batch, is of more than `longest` tokens; `searched` requests come in a search for capacity.
    """

    mixes: dict[str, str]
    budgets: tuple[int, ...]
    longest: int
    max_requests: int
    decode: Point
    searched: int
    loading_s: float

    @property
    def fixed(self) -> list[str]:
        """The schedules without a law; the one whose bubbles are judged by is the last."""
        return [f"static:budget={self.longest}@prefill-first", *(f"static:budget={tokens}" for tokens in self.budgets)]

    @property
    def policies(self) -> list[str]:
        """In the order in which they run: should time run out, what is judged is there."""
        return [PREDICTIVE, *reversed(self.fixed)]


# The paper's lengths: requests of more than 8,192 (sharegpt) or 16,384 tokens (arxiv) are left out. A CPU has a tenth.
PLACES = {
    "cuda": Place(
        {"sharegpt": "sharegpt", "arxiv": "scaled:2.6,1.2:arxiv"},
        *((512, 1536, 2048), 16_384, 256, Point(32, 4096), 1000, 180.0),
    ),
    "cpu": Place(
        {"sharegpt": "scaled:0.1,0.1:sharegpt", "arxiv": "scaled:0.26,0.12:arxiv"},
        *((48, 160, 208), 1640, 64, Point(32, 410), 300, 30.0),
    ),
}


class Setting(NamedTuple):
    """A model on ranks."""

    shape: str
    tensor: int
    stages: int

    @property
    def layout(self) -> str:
        ranks = (("tp", self.tensor), ("pp", self.stages))
        return "-".join(f"{kind}{n}" for kind, n in ranks if n > 1)

    @property
    def name(self) -> str:
        return f"{self.shape}-{self.layout}"

    def source(self, device: str) -> ModelSource:
        cuda = device == "cuda"
        return ModelSource(
            shape=self.shape if cuda else None,
            load_format="dummy",
            dtype="bfloat16" if cuda else "float32",
            device=device,
            threads=1 if cuda else 2,
        )

    def config(self, device: str) -> EngineConfig:
        """With KV blocks left to the engine, and buffers for whole prompts, which prefill-first runs."""
        place = PLACES[device]
        return EngineConfig(
            name=self.name,
            max_budget_tokens=place.longest,
            max_requests=place.max_requests,
            max_model_tokens=place.longest,
            block_tokens=0,
            kv_blocks=0,
            tensor_parallel=self.tensor,
            pipeline_parallel=self.stages,
            look_ahead=device == "cuda",
            knobs_ttl_s=3600.0,
        )


def settings(shapes: list[str], gpus: int) -> list[Setting]:
    """All shapes as pipelines of two stages first, whose decode iterations the promises are made of, then tensor
    parallel alone. Raises ValueError for an odd number of GPUs.
    """
    if gpus < 2 or gpus % 2:
        raise ValueError(f"{gpus} GPUs do not make a pipeline of two stages: give 2, 4 or 8")
    return [Setting(shape, *ranks) for ranks in ((gpus // 2, 2), (gpus, 1)) for shape in shapes]


class Mix(msgspec.Struct):
    """By promise: capacities in requests a second by policy, and how many requests are in the engine of a closed loop.

    So many are there, by Little's law, when the best fixed schedule is at its capacity.
    """

    capacity: dict[str, dict[str, float]]
    at_once: dict[str, int]


class Measured(msgspec.Struct):
    """What is known of a setting before its runs: `decode_s` is its decode iteration, through all of its stages."""

    config: EngineConfig
    decode_s: float
    mixes: dict[str, Mix] = {}


Plan = dict[str, Measured]


def promises_s(plan: Plan, shape: str, gpus: int) -> dict[str, float]:
    """Bounds on P99 TBT in seconds, the same for all of a shape's settings. ValueError before its pipeline is known."""
    pipelined = settings([shape], gpus)[0].name
    if pipelined not in plan:
        raise ValueError(f"promises are made of what {pipelined} takes, which has not run: mend that first")
    return {name: factor * plan[pipelined].decode_s for name, factor in PROMISES.items()}


def requests(place: Place, mix: str, n: int, seed: int) -> Workload:
    return make_workload("poisson:1", place.mixes[mix], np.random.default_rng(seed), n, place.longest)


class Search(NamedTuple):
    """A search for the capacity of a policy, to be made anywhere."""

    model: Path
    config: EngineConfig
    workload: Workload
    tbt_s: float
    policy: str
    seed: int

    def run(self) -> tuple[float, float]:
        """(requests a second, how many of them are in the engine then). 0 if no rate keeps the promise."""
        plant = Plant(self.config, StepTimeModel.load(self.model))
        trial = Trial(plant, self.workload, Slo(tbt_s=self.tbt_s), self.seed, self.policy)
        rate = trial.capacity()
        return rate, rate * float(trial.simulate(rate).e2el_s.mean()) if rate else 0.0


def search_capacities(
    pool: Pool, model: Path, measured: Measured, place: Place, bounds_s: dict[str, float], seed: int
) -> Iterator[tuple[str, Mix]]:
    """Of every mix, what a setting can do by simulation."""
    workloads = {mix: requests(place, mix, place.searched, seed) for mix in place.mixes}
    keys = list(product(place.mixes, bounds_s, place.policies))
    searches = [Search(model, measured.config, workloads[m], bounds_s[p], policy, seed) for m, p, policy in keys]
    found = {keys[i]: result for i, result in in_parallel(pool, Search.run, searches)}
    for mix in place.mixes:
        capacity = {p: {policy: found[mix, p, policy][0] for policy in place.policies} for p in bounds_s}
        at_once = {}
        for promise in bounds_s:
            there = round(max(found[mix, promise, policy] for policy in place.fixed)[1])
            at_once[promise] = min(max(there, 2 * measured.config.pipeline_parallel), place.max_requests)
        yield mix, Mix(capacity, at_once)
