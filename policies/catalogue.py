"""Every law by its name on the command line: `pid`, or with parameters `pid:set_point=0.9,window=256`."""

import inspect
from collections.abc import Callable

from engine.protocol import Telemetry
from policies.aimd import Aimd
from policies.pid import Pid
from policies.policy import Policy
from policies.static import Static

LAWS: dict[str, Callable[..., Policy]] = {"static": Static, "pid": Pid, "aimd": Aimd}


def parse_law(spec: str) -> Callable[[Telemetry, float], Policy]:
    """The law that `spec` names, to be made from an engine's first telemetry and the TBT SLO in seconds.

    Raises ValueError naming an unknown law, an unknown parameter or a value that is no number.
    """
    name, _, text = spec.partition(":")
    if name not in LAWS:
        raise ValueError(f"unknown policy {name!r}: choose from {', '.join(LAWS)}")
    law = LAWS[name]
    known = {p.name: p.default for p in inspect.signature(law).parameters.values() if p.default is not p.empty}
    values: dict[str, float] = {}
    for item in filter(None, text.split(",")):
        key, _, value = item.partition("=")
        if key not in known:
            raise ValueError(f"policy {name!r} has no parameter {key!r}: it has {', '.join(known) or 'none'}")
        try:
            values[key] = type(known[key])(value)
        except ValueError:
            raise ValueError(f"policy {name!r}: {key}={value!r} is not a {type(known[key]).__name__}") from None
    return lambda first, tbt_slo_s: law(first, tbt_slo_s, **values)
