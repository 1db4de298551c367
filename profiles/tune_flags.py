"""The flags of `pacer tune`, and the problem that they state."""

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, Any

from envs.trace import ARRIVALS_HELP, LENGTHS_HELP
from profiles.compare_flags import H200, REQUESTS, question

if TYPE_CHECKING:
    from profiles.tune_objective import Problem

STATIC = "static"
FAMILIES = (STATIC, "pid", "aimd", "predictive")
TRIALS = 40


def add_flags(parser: argparse.ArgumentParser) -> None:
    """All has a default: the conversation workload on an H200, within 40 ms."""
    add = parser.add_argument
    add("--profile", type=Path, default=H200, help="step-time model of the machine, as JSON (see pacer profile)")
    add("--trace", default="conversation", metavar="LENGTHS", help=LENGTHS_HELP)
    add("--arrivals", default="poisson:1", help=f"at each rate stretched to it: {ARRIVALS_HELP}")
    add("--slo", default="tbt:40", help='the promise in milliseconds, as in "tbt:40 ttft:2000"')
    families = f"laws to tune; {STATIC} is always tuned first, the others start from it"
    add("--policies", nargs="+", default=FAMILIES, choices=FAMILIES, metavar="LAW", help=families)
    add("--trials", type=int, default=TRIALS, help="of each law; random search and a grid then spend as much")
    add("--seeds", type=int, default=3, help="how many; each has requests and noise of its own, in every trial")
    add("--seed", type=int, default=0, help="of the search itself")
    add("--num-prompts", type=int, help=f"requests of a seed; default: {REQUESTS}, where the arrivals do not fix it")
    add("--max-num-seqs", type=int, default=256, help="most requests running at once; fewer are tried too")
    add("--max-num-batched-tokens", type=int, default=8192, help="largest budget tried")
    add("--max-model-len", type=int, help="leave out requests longer than this; default: 131072")
    add("--kv-blocks", type=int, default=55_000, help="of 16 tokens")
    add("--dead-time", type=int, default=1, help="iterations from a report until its answer acts")
    storage = "where the studies are kept: a database URL that several processes may share; default: study.db in --out"
    add("--storage", metavar="URL", help=storage)
    add("--processes", type=int, help="default: one for each processor")
    add("--timeout", type=float, metavar="S", help="seconds in all; no trial begins after that")
    live = (
        "tune the budget of this running engine while it serves, by its --name or tcp:// addresses; of these flags it "
    )
    live += "reads --slo, --trials, --timeout, --storage and --out alone"
    add("--live", metavar="NAME | TELEMETRY,KNOBS", help=live)
    add("--hold", action="store_true", help="with --live: keep the engine on the knobs found until Ctrl-C")
    add("--out", type=Path, default=Path("pacer-out/tune"), help="folder for the tuned knobs, the study and the report")


def problem(args: argparse.Namespace, when: str) -> tuple["Problem", str, dict[str, Any]]:
    """What the flags ask, its title and provenance. Raises ValueError with the remedy for what does not fit."""
    from profiles.tune_objective import Problem  # noqa: PLC0415  (Optuna takes a second, which other verbs need not wait)

    for name in ("trials", "processes"):
        value = getattr(args, name)
        if value is not None and value < 1:
            raise ValueError(f"--{name} is {value}; it must be at least 1")
    if args.timeout is not None and not args.timeout > 0:
        raise ValueError(f"--timeout is {args.timeout}; it must be a positive number of seconds")
    asked = argparse.Namespace(**{**vars(args), "policies": (STATIC,), "grid": None, "rates": ()})
    compared = question(asked, when)
    provenance = {**compared.provenance, "flags": {**compared.provenance["flags"], "policies": list(args.policies)}}
    return Problem(compared.plant, compared.workloads, compared.slo), compared.title, provenance
