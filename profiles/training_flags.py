"""The flags of `pacer train`."""

import argparse
from pathlib import Path

from envs.codec import FORMS
from envs.trace import LENGTHS_HELP
from profiles.compare_flags import H200

PROFILE_HELP = "step-time model of the machine, as JSON, or a folder of pacer record: then it is fitted to that"


def add_flags(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--profile", type=Path, default=H200, help=PROFILE_HELP)
    add("--traces", nargs="+", default=["code", "sharegpt"], metavar="LENGTHS", help=f"to train on: {LENGTHS_HELP}")
    add("--validation", nargs="+", metavar="LENGTHS", help="to choose the best by; default: a fifth of --traces")
    add("--slo", default="tbt:40", help="the promise in milliseconds; trained on a third to three times as much")
    add("--form", default="limit", choices=FORMS, help="of the actions: knobs, or a time limit that is filled")
    add("--steps", type=int, default=6_000_000, help="iterations that each seed learns from")
    add("--minutes", type=float, help="of training in all; it ends when they are over, or the steps done")
    add("--seeds", type=int, default=3, help="how many")
    add("--seed", type=int, default=0, help="the first one")
    add("--processes", type=int, help="that score laws; default: one for each processor")
    add("--out", type=Path, default=Path("pacer-out/train"), help="folder; the law is named after it: NAME/NAME.npz")


def check(args: argparse.Namespace) -> None:
    """Raises ValueError with the remedy."""
    for name in ("steps", "seeds", "minutes", "processes"):
        value = getattr(args, name)
        if value is not None and not value > 0:
            raise ValueError(f"--{name} is {value}; it must be above 0")
    if args.seed < 0:
        raise ValueError(f"--seed is {args.seed}; it must be at least 0")
    if not args.out.name or set(",@") & set(str(args.out)):
        raise ValueError(f"--out is {args.out}; the law is called by it: give a name without comma and @")
