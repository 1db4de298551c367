"""Every law by its name on the command line: `pid`, or with parameters `pid:set_point=0.9,window=256`."""

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from engine.protocol import Telemetry
from envs.slo import Slo
from policies.aimd import Aimd
from policies.peers import GllmThrottle, PPas, SarathiDynamic, TrtllmTuner
from policies.peers_timed import AscendDynamicBatch, SglangDynamicChunk
from policies.pid import Pid
from policies.policy import Policy
from policies.predictive import Predictive
from policies.qoserve import QoServe
from policies.rl import Rl
from policies.static import Static

if TYPE_CHECKING:
    from envs.step_time import StepTimeModel

LAWS: dict[str, Callable[..., Policy]] = {
    "static": Static,
    "pid": Pid,
    "aimd": Aimd,
    "predictive": Predictive,
    "rl": Rl,
    "qoserve": QoServe,
    "ppas": PPas,
    "trtllm": TrtllmTuner,
    "sglang": SglangDynamicChunk,
    "gllm": GllmThrottle,
    "ascend": AscendDynamicBatch,
    "sarathi-dynamic": SarathiDynamic,
}
"""A law's constructor names what it needs besides the first telemetry: `slo`, or of it `tbt_slo_s`, `ttft_slo_s`,
`quantile`; `step_time`.

It may have RANGES: the parameters that can be set here, each with its lowest and highest value; and FILES: those that
name something to load, each with what loads it, by a default name if none is given; and `check`, which raises
ValueError for an SLO that it cannot serve. A peer's law that knows an SLO is
AS_PUBLISHED: Guard's slew limit and lock-in watch would make another law of it.
"""

_REMEDIES = {
    "slo": "needs to know the promise: add --slo tbt:MILLISECONDS",
    "tbt_slo_s": "needs to know the promise: add --slo tbt:MILLISECONDS",
    "ttft_slo_s": "needs to know the promise: add ttft:MILLISECONDS to --slo",
    "step_time": "needs to know how long a step takes: add --profile FILE, a step-time model as JSON",
}


@dataclass(frozen=True, slots=True)
class Law:
    """A law with its parameters: `make` starts it from an engine's first telemetry.

    `tbt_slo_s` is the promise that Guard watches over for it. None passes its knobs through, clamped and in whole
    tiles: for fixed knobs, for laws that answer for no SLO, and for a peer's law, which is compared as published.
    """

    spec: str
    tbt_slo_s: float | None
    make: Callable[[Telemetry], Policy]


def parse_law(spec: str, slo: Slo | None = None, step_time: "StepTimeModel | None" = None) -> Law:
    """The law that `spec` names, for this promise and on a machine of this step time.

    Raises ValueError naming an unknown law or parameter, a value that is no number or out of range, the flag that
    would give what the law needs and does not have, or an SLO that it cannot serve.
    """
    name, _, text = spec.partition(":")
    if name not in LAWS:
        raise ValueError(f"unknown policy {name!r}: choose from {', '.join(LAWS)}")
    make = LAWS[name]
    arguments = _parse_values(name, text, getattr(make, "RANGES", {}), getattr(make, "FILES", {}))
    had = {
        "slo": slo,
        "tbt_slo_s": slo.pace_s if slo else None,
        "ttft_slo_s": slo.ttft_s if slo else None,
        "step_time": step_time,
        "quantile": slo.quantile if slo else None,
    }
    for need, parameter in inspect.signature(make).parameters.items():
        if need not in had or need in arguments:
            continue
        if had[need] is not None:
            arguments[need] = had[need]
        elif parameter.default is parameter.empty:
            raise ValueError(f"policy {name!r} {_REMEDIES[need]}")
    if slo and (check := getattr(make, "check", None)):
        check(slo)
    promised = {"slo", "tbt_slo_s"} & arguments.keys() and not getattr(make, "AS_PUBLISHED", False)
    watched = slo.pace_s if slo and promised else None
    return Law(spec, watched, lambda first: make(first, **arguments))


def _parse_values(
    name: str, text: str, ranges: Mapping[str, tuple[float, float]], files: Mapping[str, Callable[..., Any]]
) -> dict[str, Any]:
    values: dict[str, Any] = {}
    for item in filter(None, text.split(",")):
        key, _, value = item.partition("=")
        if key in files:
            values[key] = files[key](value)
            continue
        if key not in ranges:
            known = ", ".join((*ranges, *files)) or "none"
            raise ValueError(f"policy {name!r} has no parameter {key!r}: it has {known}")
        low, high = ranges[key]
        kind = type(low)
        try:
            values[key] = kind(value)
        except ValueError:
            raise ValueError(f"policy {name!r}: {key}={value!r} is not of type {kind.__name__}") from None
        if not low <= values[key] <= high:
            raise ValueError(f"policy {name!r}: {key}={value} is outside {low} to {high}")
    return {key: load() for key, load in files.items() if key not in values} | values
