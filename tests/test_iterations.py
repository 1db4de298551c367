"""Tables of iterations from telemetry: what an interval is, and when there is none."""

import msgspec
import numpy as np

from engine.config import EngineConfig
from envs.simulator import Plant, Simulation
from envs.step_time import StepTimeModel
from envs.trace import make_workload
from profiles.iterations import IterationRows

MODEL = StepTimeModel.from_formula((5e-3, 1e-5, 4e-8), (6e-3, 5e-5, 4e-8, 1e-9, 3e-4)).with_noise(0.1)


def messages(rate: float) -> list[dict[str, object]]:
    requests = make_workload(f"poisson:{rate}", "uniform:10-500,1-40", np.random.default_rng(0), 30)
    simulation = Simulation(Plant(EngineConfig(), MODEL), requests)
    heard = []
    while not simulation.done:
        simulation.step(256, 128)
        heard.append(msgspec.to_builtins(simulation.telemetry()))
    return heard


def test_an_interval_is_the_time_since_the_completion_before_and_unknown_after_idling() -> None:
    heard, joined = messages(rate=2.0), IterationRows()
    rows = [row for message in heard for row in joined.add(message)]
    idled = sum(m["batch"]["decode_tokens"] + m["batch"]["prefill_tokens"] == 0 for m in heard)  # type: ignore[index]
    unknown = [row for row in rows if row["interval_s"] is None]
    assert len(rows) == heard[-1]["iteration"]
    assert idled > 5
    assert len(unknown) == idled  # the first row, and one after each idle time but the last
    for row in rows:
        if row["interval_s"] is not None:
            assert abs(row["interval_s"] - row["device_s"]) < 1e-8


def test_a_lost_message_leaves_no_interval_of_two_iterations() -> None:
    heard, joined = messages(rate=1000.0), IterationRows()
    lost = 40
    rows = [row for i, message in enumerate(heard) if i != lost for row in joined.add(message)]
    assert len(rows) < heard[-1]["iteration"]  # type: ignore[operator]
    assert all(abs(row["interval_s"] - row["device_s"]) < 1e-8 for row in rows if row["interval_s"] is not None)
