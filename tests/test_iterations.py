"""Tables of iterations from telemetry: what an interval is, and when there is none."""

import tracemalloc
from pathlib import Path

import msgspec
import numpy as np
import pytest
from plant import Loop

from controller.journal import _write_part
from engine.config import EngineConfig
from envs.simulator import Plant, Simulation
from envs.step_time import StepTimeModel
from envs.trace import make_workload
from profiles.iterations import SCHEMA, IterationRows, read_iterations

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


def test_a_row_tells_of_the_head_alone() -> None:
    heard, joined = messages(rate=1000.0), IterationRows()
    rows = [row for message in heard for row in joined.add(message)]
    queues = {message["iteration"]: message["queue"] for message in heard}
    told = set()
    for row in rows:
        queue = queues[row["iteration"]]
        remaining, context = queue["prompt_remaining_tokens"], queue["prompt_context_tokens"]  # type: ignore[index]
        assert row["head_remaining_tokens"] == (remaining[0] if remaining else 0)
        assert row["head_context_tokens"] == (context[0] if context else 0)
        assert row.keys() == set(SCHEMA.names)
        told.add(min(len(remaining), 2))
    assert told == {0, 1, 2}


def test_a_journal_of_another_protocol_is_refused(tmp_path: Path) -> None:
    loop = Loop("static:budget=256")
    loop.run_saturated(1)
    old = [
        msgspec.structs.replace(row, telemetry=msgspec.structs.replace(row.telemetry, version=2))
        for row in loop.journal
    ]
    _write_part(tmp_path, old)
    with pytest.raises(ValueError, match=r"part-00000.*protocol version 2"):
        read_iterations(tmp_path)


def test_a_journal_is_read_part_by_part(tmp_path: Path) -> None:
    loop = Loop("static:budget=256")
    loop.run_saturated(15)
    rows = list(loop.journal)

    def peak_of_reading(parts: int) -> tuple[int, int]:
        journal = tmp_path / str(parts)
        journal.mkdir()
        for part in range(parts):
            shifted = [
                msgspec.structs.replace(row, telemetry=msgspec.structs.replace(row.telemetry, engine_id=f"e-{part}"))
                for row in rows
            ]
            _write_part(journal, shifted)
        tracemalloc.start()
        n_rows = read_iterations(journal).num_rows
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        return n_rows, peak

    few, many = peak_of_reading(3), peak_of_reading(15)
    assert many[0] == 5 * few[0] > 3000
    assert many[1] < 1.5 * few[1]
