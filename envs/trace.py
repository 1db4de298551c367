"""Workloads: who asks when for how much. Read from a file, or generated from distributions and a seeded generator.

A workload is arrival times and (prompt, output) lengths in tokens. Each half is chosen by a short spec, see
`make_workload`. A new trace format is one function `(path) -> Workload | Lengths`, entered in `READERS`.
"""

from numpy.random import Generator

from envs.arrivals import ARRIVALS_HELP, day_arrivals, gamma_arrivals, generated_arrivals, named_number, phase_arrivals
from envs.lengths import LENGTHS_HELP, draw_lengths, length_sampler, recorded
from envs.presets import PRESETS
from envs.trace_readers import READERS, read_csv
from envs.workload import Lengths, Workload, write_csv

__all__ = [
    "ARRIVALS_HELP",
    "LENGTHS_HELP",
    "PRESETS",
    "READERS",
    "Lengths",
    "Workload",
    "day_arrivals",
    "gamma_arrivals",
    "make_workload",
    "phase_arrivals",
    "read_csv",
    "write_csv",
]


def make_workload(
    arrivals: str, lengths: str, rng: Generator, n_requests: int | None = None, max_model_tokens: int | None = None
) -> Workload:
    """A workload from two specs (`ARRIVALS_HELP`, `LENGTHS_HELP`); the same specs and seed give the same bytes.

    "trace" replays the rows of the lengths' file in order, the first `n_requests` of them, at its own arrivals times
    `scale`; for a preset it draws arrivals of the preset's own rate times `scale`, and its own variation. "phases" and
    "day" fix the number of requests themselves. All others need `n_requests`, and draw lengths (from a file: rows with
    replacement). "alternate" chooses lengths by the time of arrival: one part after the other, again and again from
    time 0 on. Requests of prompt + output > `max_model_tokens` are left out ("trace" of a file) or drawn again, and
    counted in `rejected_requests`. Raises ValueError with the spec and the remedy.
    """
    if n_requests is not None and n_requests < 1:
        raise ValueError(f"n_requests is {n_requests}; it must be at least 1")
    if max_model_tokens is not None and max_model_tokens < 2:
        raise ValueError(f"max_model_tokens is {max_model_tokens}; it must leave room for a prompt and an output")
    kind, _, options = arrivals.partition(":")
    if kind == "trace":
        scale = named_number(options, "scale") if options else 1.0
        if lengths not in PRESETS:
            workload = _replayed(lengths).first(n_requests).at_scale(scale)
            return workload if max_model_tokens is None else workload.fitting(max_model_tokens)
        arrivals = _own_arrivals(lengths, scale)
    arrival_s = generated_arrivals(arrivals, n_requests, rng)
    drawn, rejected = draw_lengths(length_sampler(lengths), arrival_s, rng, max_model_tokens)
    return Workload(arrival_s, drawn.prompt_tokens, drawn.output_tokens, rejected)


def _replayed(lengths: str) -> Workload:
    trace = recorded(lengths)
    if isinstance(trace, Lengths):
        raise ValueError(f"arrivals 'trace': {lengths!r} has lengths only; generate arrivals: {ARRIVALS_HELP}")
    return trace


def _own_arrivals(name: str, scale: float) -> str:
    preset = PRESETS[name]
    if preset.rate_per_s is None:
        raise ValueError(f"arrivals 'trace': {name!r} has lengths only; generate arrivals: {ARRIVALS_HELP}")
    return f"gamma:{preset.rate_per_s * scale!r},cv={preset.cv!r}"
