"""Every law by its name on the command line: `pid`, or with parameters `pid:set_point=0.9,window=256`."""

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from engine.protocol import Telemetry
from policies.aimd import Aimd
from policies.pid import Pid
from policies.policy import Policy
from policies.static import Static

LAWS: dict[str, Callable[..., Policy]] = {"static": Static, "pid": Pid, "aimd": Aimd}
"""A law may have RANGES: the parameters that can be set here, each with its lowest and highest value."""


@dataclass(frozen=True, slots=True)
class Law:
    """A law with its parameters: `make` starts it from an engine's first telemetry.

    `tbt_slo_s` is the promise it answers for; None for one that answers for none (fixed knobs).
    """

    spec: str
    tbt_slo_s: float | None
    make: Callable[[Telemetry], Policy]


def parse_law(spec: str, tbt_slo_s: float | None = None) -> Law:
    """The law that `spec` names.

    Raises ValueError naming an unknown law or parameter, a value that is no number or out of range, or the missing SLO.
    """
    name, _, text = spec.partition(":")
    if name not in LAWS:
        raise ValueError(f"unknown policy {name!r}: choose from {', '.join(LAWS)}")
    parameters = inspect.signature(LAWS[name]).parameters
    values = _parse_values(name, text, getattr(LAWS[name], "RANGES", {}))
    make = LAWS[name]
    if "tbt_slo_s" not in parameters:
        return Law(spec, None, lambda first: make(first, **values))
    if tbt_slo_s is None:
        raise ValueError(f"policy {name!r} needs to know the promise: add --slo tbt:MILLISECONDS")
    return Law(spec, tbt_slo_s, lambda first: make(first, tbt_slo_s, **values))


def _parse_values(name: str, text: str, ranges: Mapping[str, tuple[float, float]]) -> dict[str, float]:
    values: dict[str, float] = {}
    for item in filter(None, text.split(",")):
        key, _, value = item.partition("=")
        if key not in ranges:
            raise ValueError(f"policy {name!r} has no parameter {key!r}: it has {', '.join(ranges) or 'none'}")
        low, high = ranges[key]
        kind = type(low)
        try:
            values[key] = kind(value)
        except ValueError:
            raise ValueError(f"policy {name!r}: {key}={value!r} is not of type {kind.__name__}") from None
        if not low <= values[key] <= high:
            raise ValueError(f"policy {name!r}: {key}={value} is outside {low} to {high}")
    return values
