"""A rehearsal lets every law run through, so that all it needs is compiled."""

import pytest

from engine.protocol import Telemetry
from envs.slo import Slo
from envs.step_time import StepTimeModel
from policies.catalogue import LAWS, Law, parse_law
from policies.policy import Decision, Policy
from policies.rehearsal import rehearse

MODEL = StepTimeModel.from_formula((0.005, 1e-5, 1e-8), (0.005, 1e-5, 1e-8, 1e-9, 1e-4))


@pytest.mark.parametrize("name", LAWS)
def test_every_law_decides_to_the_end(name: str) -> None:
    law = parse_law(name, Slo(tbt_s=0.1, ttft_s=1.0), MODEL)
    decided: list[Decision] = []

    class Watched:
        def __init__(self, first: Telemetry) -> None:
            self.law: Policy = law.make(first)

        def decide(self, telemetry: Telemetry) -> Decision:
            decided.append(self.law.decide(telemetry))
            return decided[-1]

        def track(self, sent: Decision) -> None: ...

    rehearse(Law(name, None, Watched))
    assert len(decided) == 3


def test_a_law_that_fails_is_left_to_its_guard() -> None:
    def broken(_: Telemetry) -> Policy:
        raise RuntimeError("not today")

    rehearse(Law("broken", None, broken))
