"""Tasks of the benchmarks of the laws: each one policy on one seed's requests.

The key of a task holds all that its result depends on, the source of its law included: a law that was changed is
judged anew. It does not hold the simulator's source: delete the folder after changing that.
"""

import ast
import hashlib
from functools import cache
from pathlib import Path
from typing import NamedTuple

import msgspec
import numpy as np

import envs
import policies
from benchmarks.tasks import Result
from envs.outcome import FloatArray, Outcome
from policies.catalogue import LAWS
from policies.rl import Trained
from profiles.capacity import Trial, meets

TOLERANCE = 0.01
GRACE_S = 600.0  # after the last arrival, a run is left
WINDOW_S = 60.0
FEW_TOKENS = 1000  # a window of so few is not judged by its P99


class Search(NamedTuple):
    """The capacity, searched from `guess` on."""

    trial: Trial
    guess: float

    def key(self) -> str:
        return f"capacity {TOLERANCE} {trial_key(self.trial)}"

    def do(self) -> Result:
        return {"capacity": self.trial.capacity(self.guess, TOLERANCE)}


class Climb(NamedTuple):
    """The capacity at each static budget, each searched from its neighbour's on. The trial's policy is `static`."""

    trial: Trial
    budgets: tuple[int, ...]
    guess: float

    def key(self) -> str:
        return f"climb {TOLERANCE} {' '.join(map(str, self.budgets))} {trial_key(self.trial)}"

    def do(self) -> Result:
        t, near, found = self.trial, self.guess, {}
        for budget in self.budgets:
            trial = Trial(t.plant, t.load, t.slo, t.seed, f"static:budget={budget}")
            found[str(budget)] = trial.capacity(near, TOLERANCE)
            near = found[str(budget)] or near
        return found


class Judge(NamedTuple):
    """One run at one rate, times in seconds; `met` is a capacity's verdict on it: the SLO, the delay and the end.

    `worst_window_tbt_s` is the P99 TBT of the worst window of `WINDOW_S`. A request without a token `GRACE_S` after
    the last arrival counts with the time it waited till then.
    """

    trial: Trial
    rate: float

    def key(self) -> str:
        return f"run {self.rate!r} {trial_key(self.trial)}"

    def do(self) -> Result:
        end_s = float(self.trial.load.at_rate(self.rate).arrival_s[-1]) + GRACE_S
        outcome = self.trial.simulate(self.rate, end_s)
        ttft_s = np.where(np.isnan(outcome.ttft_s), end_s - outcome.workload.arrival_s, outcome.ttft_s)
        at_s, tbt_s = gaps(outcome)
        return {
            "met": float(meets(outcome, self.trial.slo)),
            "unfinished": float((~outcome.finished).sum()),
            "ttft_median_s": float(np.median(ttft_s)),
            "ttft_p99_s": float(np.quantile(ttft_s, 0.99)),
            "tbt_p99_s": float(np.quantile(tbt_s, 0.99)),
            "worst_window_tbt_s": float(np.max(windowed_tbt_s(at_s, tbt_s, WINDOW_S), initial=0.0)),
        }


def gaps(outcome: Outcome) -> tuple[FloatArray, FloatArray]:
    """Every gap between two tokens of a request: when it ended, and how long it was, in seconds."""
    within = np.ones(len(outcome.token_times_s), np.bool_)
    within[outcome.first_token_row] = False
    tbt_s = np.diff(outcome.token_times_s, prepend=np.nan)
    within &= ~np.isnan(tbt_s)
    return outcome.token_times_s[within], tbt_s[within]


def windowed_tbt_s(at_s: FloatArray, tbt_s: FloatArray, window_s: float, quantile: float = 0.99) -> FloatArray:
    """The quantile of the gaps that ended in each window; windows of fewer than `FEW_TOKENS` are left out."""
    order = np.argsort(at_s)
    edges = np.arange(0.0, float(np.max(at_s, initial=0.0)) + window_s, window_s)
    parts = np.split(tbt_s[order], np.searchsorted(at_s[order], edges[1:]))
    return np.array([np.quantile(part, quantile) for part in parts if len(part) >= FEW_TOKENS])


def trial_key(trial: Trial) -> str:
    plant, unit = trial.plant, trial.load.at_rate(1.0)
    settings = (plant.config, plant.dead_time_iterations, plant.reserve_output, str(trial.slo))
    digest = hashlib.sha256(repr(settings).encode())
    for values in (unit.arrival_s, unit.prompt_tokens, unit.output_tokens):
        digest.update(values.tobytes())
    digest.update(msgspec.json.encode(plant.step_time.description))
    law, _, options = trial.policy.partition(":")
    source = law_digest(law)
    if law == "rl":
        source += Trained.load(*filter(None, [options.removeprefix("name=")])).card.sha256[:8]
    return f"{trial.policy} {trial.seed} {digest.hexdigest()[:16]} {source}"


@cache
def law_digest(law: str) -> str:
    """Of the source of a law: its module, what that imports of its room and of envs, and Guard.

    Empty where nothing is decided.
    """
    if law not in LAWS or law == "static":
        return ""
    found, open_ = {"policies.guard"}, [LAWS[law].__module__]
    while open_:
        found.add(name := open_.pop())
        imports = (node.module for node in ast.walk(ast.parse(_source(name))) if isinstance(node, ast.ImportFrom))
        names = {module for module in imports if module and module.startswith(("policies.", "envs."))}
        open_ += sorted(names - found)
    return hashlib.sha256("".join(_source(name) for name in sorted(found)).encode()).hexdigest()[:8]


def _source(module: str) -> str:
    room, _, name = module.partition(".")
    return (Path({"policies": policies, "envs": envs}[room].__path__[0]) / f"{name}.py").read_text()
