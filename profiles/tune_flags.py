"""The flags of `pacer tune`, and the problem that they state."""

import argparse
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import msgspec

from envs.slo import Slo
from envs.step_time import StepTimeModel
from envs.trace import ARRIVALS_HELP, LENGTHS_HELP
from policies.catalogue import parse_law
from profiles.compare_flags import H200, LONGEST, REQUESTS, question

if TYPE_CHECKING:
    from profiles.tune_objective import Problem

STATIC = "static"
FAMILIES = (STATIC, "pid", "aimd", "predictive")
TRIALS = 40
FLAG_BLOCK_TOKENS = 16

Count = Annotated[int, msgspec.Meta(ge=1)]


class Capacities(msgspec.Struct, frozen=True):
    """An engine's, as its profile's provenance tells them; where it does not, those of an H200."""

    max_budget_tokens: Count = 8192
    max_requests: Count = 256
    max_model_tokens: Count = LONGEST
    block_tokens: Count = FLAG_BLOCK_TOKENS
    kv_blocks: Count = 55_000
    look_ahead: bool = False

    @classmethod
    def of(cls, profile: Path) -> "Capacities":
        """Raises ValueError naming the file."""
        return cls.told(StepTimeModel.load(profile), profile)

    @classmethod
    def told(cls, model: StepTimeModel, source: Path) -> "Capacities":
        """By a model that came from `source`, which a ValueError names."""
        try:
            return msgspec.convert(model.description.provenance.get("capacities", {}), cls)
        except msgspec.ValidationError as error:
            raise ValueError(f"{source}: provenance.capacities: {error}: make it again with pacer profile") from error


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
    own, other = "default: the profiled engine's", Capacities()
    most = f"most requests running at once; fewer are tried too; {own}, else {other.max_requests}"
    add("--max-num-seqs", type=int, help=most)
    add("--max-num-batched-tokens", type=int, help=f"largest budget tried; {own}, else {other.max_budget_tokens}")
    longest = f"leave out requests longer than this; {own}, else {other.max_model_tokens}"
    add("--max-model-len", type=int, help=longest)
    add("--kv-blocks", type=int, help=f"of {FLAG_BLOCK_TOKENS} tokens; {own}, else {other.kv_blocks}")
    add("--dead-time", type=int, default=1, help="iterations from a report until its answer acts")
    storage = "where the studies are kept: a database URL that several processes may share; default: study.db in --out"
    add("--storage", metavar="URL", help=storage)
    add("--processes", type=int, help="default: one for each processor")
    add("--timeout", type=float, metavar="S", help="seconds in all; after the first guess no trial begins after that")
    live = (
        "tune the budget of this running engine while it serves, by its --name or tcp:// addresses; of these flags it "
    )
    live += "reads --slo, --trials, --timeout, --storage and --out alone"
    add("--live", metavar="NAME | TELEMETRY,KNOBS", help=live)
    add("--hold", action="store_true", help="with --live: keep the engine on the knobs found until Ctrl-C")
    add("--out", type=Path, default=Path("pacer-out/tune"), help="folder for the tuned knobs, the study and the report")


def check_limits(args: argparse.Namespace) -> None:
    """The flags that say how long to search. Raises ValueError with the remedy."""
    if args.trials < 1:
        raise ValueError(f"--trials is {args.trials}; it must be at least 1")
    if args.timeout is not None and not args.timeout > 0:
        raise ValueError(f"--timeout is {args.timeout}; it must be a positive number of seconds")


def problem(args: argparse.Namespace, when: str) -> tuple["Problem", str, dict[str, Any]]:
    """What the flags ask, its title and provenance. Raises ValueError with the remedy for what does not fit."""
    from profiles.tune_objective import Problem  # noqa: PLC0415  (Optuna takes a second, which other verbs need not wait)
    from profiles.tune_storage import shown  # noqa: PLC0415  (as above)

    _check(args)
    own = Capacities.of(args.profile)
    if args.kv_blocks is not None:
        own = msgspec.structs.replace(own, kv_blocks=args.kv_blocks, block_tokens=FLAG_BLOCK_TOKENS)
    asked = argparse.Namespace(**vars(args) | {"policies": (STATIC,), "grid": None, "rates": ()})
    asked.max_num_seqs = args.max_num_seqs or own.max_requests
    asked.max_num_batched_tokens = args.max_num_batched_tokens or own.max_budget_tokens
    asked.max_model_len = args.max_model_len or own.max_model_tokens
    asked.kv_blocks = own.kv_blocks * own.block_tokens // FLAG_BLOCK_TOKENS
    compared = question(asked, when)
    plant = compared.plant
    config = replace(plant.config, block_tokens=own.block_tokens, kv_blocks=own.kv_blocks, look_ahead=own.look_ahead)
    storage = shown(args.storage) if args.storage else None
    flags = {**compared.provenance["flags"], "policies": list(args.policies), "storage": storage}
    stated = Problem(replace(plant, config=config), compared.workloads, compared.slo)
    return stated, compared.title, {**compared.provenance, "flags": flags}


def _check(args: argparse.Namespace) -> None:
    """What `question` does not find, or finds late. A law that cannot run is better refused before others are tuned."""
    check_limits(args)
    if args.hold:
        raise ValueError("--hold is for --live: there is no engine to hold here")
    if args.seed < 0:
        raise ValueError(f"--seed is {args.seed}; it must be at least 0")
    least_one = ("processes", "num_prompts", "max_num_seqs", "max_num_batched_tokens", "max_model_len", "kv_blocks")
    for name in least_one:
        value = getattr(args, name)
        if value is not None and value < 1:
            raise ValueError(f"--{name.replace('_', '-')} is {value}; it must be at least 1")
    slo, step_time = Slo.parse(args.slo), StepTimeModel.load(args.profile)
    for law in args.policies:
        try:
            parse_law(law, slo, step_time)
        except ValueError as error:
            raise ValueError(f"{error}; or leave {law} out of --policies") from error
