"""The flags of `pacer bench`."""

import argparse
from pathlib import Path

from envs.trace import ARRIVALS_HELP, LENGTHS_HELP


def add_flags(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--base-url", default="http://127.0.0.1:8000")
    add("--model", help="default: the first of /v1/models")
    add("--arrivals", default="poisson:1", help=ARRIVALS_HELP)
    add("--lengths", default="uniform:64-512,16-64", help=LENGTHS_HELP)
    add("--num-prompts", type=int, help="number of requests, where the arrivals do not fix it")
    add("--max-model-len", type=int, help="leave out requests longer than this")
    add("--text", action="store_true", help="send words, for endpoints that refuse token ids (lengths are approximate)")
    add("--goodput", metavar="SLO", help='in milliseconds, as in "ttft:2000 tbt:100"; also tpot, deadline, e2el')
    add("--grace", type=float, default=60.0, help="seconds after the last arrival until the rest counts as unfinished")
    add("--seed", type=int, default=0)
    add("--save-result", type=Path, metavar="FILE", help="write the figures as JSON, in vllm bench serve's keys")
    add("--save-detailed", action="store_true", help="with every request's latencies")
