"""Decides which knobs an iteration runs under: the newest decision, or the fallback when none has come for too long."""

from engine.config import EngineConfig
from engine.link import Link
from engine.protocol import InForce


class Actuator:
    """Reads the newest knobs without waiting; after `knobs_ttl_s` without any, the engine is on its static knobs."""

    def __init__(self, config: EngineConfig, link: Link) -> None:
        self._link = link
        self._ttl_ns = int(config.knobs_ttl_s * 1e9)
        self._fallback = InForce(config.budget_tokens, config.chunk_tokens, 0, 0, "fallback")
        self._in_force = self._fallback
        self._received_ns = 0

    def read(self, now_ns: int) -> InForce:
        knobs = self._link.poll()
        if knobs is not None:
            self._in_force = InForce(
                knobs.budget_tokens, knobs.chunk_tokens, knobs.sequence, knobs.iteration, "controller"
            )
            self._received_ns = now_ns
        elif self._in_force.source == "controller" and now_ns - self._received_ns > self._ttl_ns:
            # The echo keeps the sequence, so that a new controller knows where to go on.
            self._link.forget()
            last = self._in_force
            self._in_force = InForce(
                self._fallback.budget_tokens, self._fallback.chunk_tokens, last.sequence, last.iteration, "fallback"
            )
        return self._in_force
