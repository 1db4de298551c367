"""The ranks of one model, loaded once: runs are made on them, and how long their batches take is measured on them."""

import time
from pathlib import Path

import numpy as np

from engine.config import EngineConfig, ModelSource
from engine.loader import load_runner
from envs.step_time import StepTimeModel
from profiles.sweep_fit import fit_samples, measured_on
from profiles.sweep_points import BatchMaker, Point
from profiles.sweep_timing import Sweep

WARM_UP, REPEATS = 2, 15


class Ranks:
    """A runner over the processes that `config` asks for, and `config` with its KV blocks settled.

    Raises ValueError when they cannot start, with the reason.
    """

    def __init__(self, source: ModelSource, config: EngineConfig) -> None:
        self._source = source
        self.runner, self.config = load_runner(source, config, time.monotonic_ns)

    @property
    def attention(self) -> str:
        return self.runner.attention_name

    def close(self) -> None:
        self.runner.close()

    def step_time(self, path: Path, seconds: float, seed: int) -> StepTimeModel:
        """The model that `path` holds, or else that of a sweep of so many seconds made now, which is kept there."""
        if path.exists():
            return StepTimeModel.load(path)
        print(f"{self.config.name}: sweep of {seconds:.0f} s", flush=True)
        samples = Sweep(self.runner, self.config, time.monotonic_ns, seed).run(seconds)
        about = {"model": self._source.shape, "date": time.strftime("%Y-%m-%d")}
        about |= measured_on(self._source, self.config, self.attention)
        model = fit_samples(samples, self.config, about)
        model.save(path)
        print(f"{len(samples.purposes)} batches ({samples.ended}): {model.description.held_out}", flush=True)
        return model

    def iteration_s(self, point: Point) -> float:
        """Seconds from the launch of a batch to its tokens when nothing else is in flight: in a pipeline through all
        stages. The median of some. Raises ValueError for a batch that these ranks cannot form.
        """
        if not point.fits(self.config):
            raise ValueError(f"{point} does not fit {self.config.name}: raise max_requests, the model length or the KV")
        batch = BatchMaker(self.config).make(point)
        seconds = []
        for _ in range(WARM_UP + REPEATS):
            begun_ns = time.monotonic_ns()
            self.runner.launch(batch).result()
            seconds.append((time.monotonic_ns() - begun_ns) * 1e-9)
        return float(np.median(seconds[WARM_UP:]))
