"""Times batches on an engine, one after the other; nothing is served.

Batches are made (`profiles.sweep_points`) and launched back to back, as many in flight as the engine has when it
serves. Which one comes next is decided by what is known so far (`profiles.sweep_choice`): extremes come first by that
rule, and no grid is worked off. Each is repeated until its median is stable. Later every eighth is drawn at random and
kept from the fit, to judge it. In the last quarter of the time one batch is timed at size after size, up to the largest
for which that is enough: kernels serve some numbers of tokens better than their neighbours, which batches that differ
in everything do not tell.
"""

from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

from engine.config import EngineConfig
from engine.core import Pending, Runner
from engine.request import Batch
from engine.telemetry import compose
from envs.iterations import COMPOSITION, Iterations
from profiles.sweep_choice import Choice
from profiles.sweep_points import BatchMaker, Point, by_size, candidates, drawn

WARM_UP = 2  # the first run of a batch compiles and allocates; the second follows on it
LEAST, FEW, MOST = 5, 3, 25  # repetitions; few, where they take long
STABLE = 0.005  # standard error of a median, relative
SHARE_OF_TIME = 0.01  # that one batch may take with more than a few repetitions
LONGEST = 0.02  # an iteration's share of all the time, beyond which its batch is left out
JUDGED = 8  # one batch in so many is kept from the fit,
FIRST_JUDGED = 24  # once so many have shown how long the largest take
SIZES_FROM = 0.75  # of the time
FEWEST_SIZES = 16
Purpose = Literal["fit", "judge", "sizes"]
Show = Callable[[float, str], None]
"""Told after every batch how many seconds have passed, and what was found."""


class Timing(NamedTuple):
    """One iteration: `device_s` of its slowest stage, and the time since the one before completed, which was alike."""

    device_s: float
    interval_s: float


@dataclass(slots=True)
class Samples:
    """What a sweep has measured: a row for every iteration. `purposes` tells of each batch what it was timed for.

    `ended` is why the sweep did: "time", "complete", "interrupted", or what failed.
    """

    rows: list[dict[str, Any]] = field(default_factory=list)
    purposes: list[Purpose] = field(default_factory=list)
    ended: str = "time"

    def add(self, batch: Batch, timings: list[Timing], purpose: Purpose) -> None:
        composition = compose(batch)
        what = {name: getattr(composition, name) for name in COMPOSITION}
        engine_id = f"batch-{len(self.purposes)}"  # a run of its own: held-out errors then leave out whole batches
        self.rows += [{"engine_id": engine_id, "purpose": purpose, **timing._asdict(), **what} for timing in timings]
        self.purposes.append(purpose)

    @property
    def table(self) -> pa.Table:
        """Columns `engine_id` (the batch), `purpose`, `device_s`, `interval_s` and those of `COMPOSITION`."""
        return pa.Table.from_pylist(self.rows)

    def iterations(self, seconds: str, purpose: Purpose) -> Iterations:
        """Those timed for it; each row's time, "device_s" or "interval_s", is its own."""
        table = self.table
        return own_times(table.filter(pc.equal(table["purpose"], purpose)), seconds)


def own_times(table: pa.Table, seconds: str) -> Iterations:
    """Of each batch in a sweep's table `LEAST` rows with equally likely times, quantiles of those it took.

    All were preceded by their like, so every interval is an iteration's own. A batch is repeated for longer if its
    times vary: that is no reason for it to weigh more.
    """
    batches = np.unique(table["engine_id"].to_numpy(zero_copy_only=False).astype(str), return_inverse=True)[1]
    times, levels = table[seconds].to_numpy(), (np.arange(LEAST) + 0.5) / LEAST
    rows = [np.flatnonzero(batches == batch) for batch in range(batches.max() + 1)]
    own = np.concatenate([np.quantile(times[of_batch], levels, method="hazen") for of_batch in rows])
    alike = table.select(["engine_id", *COMPOSITION]).take(np.repeat([of_batch[0] for of_batch in rows], LEAST))
    return Iterations.from_table(alike.append_column("device_s", pa.array(own)), "device_s")


class Sweep:
    """Times batches on a runner; `clock` gives monotonic nanoseconds, `stop` is asked between two launches."""

    def __init__(
        self,
        runner: Runner,
        config: EngineConfig,
        clock: Callable[[], int],
        seed: int,
        stop: Callable[[], bool] = lambda: False,
    ) -> None:
        self.samples = Samples()
        self._runner, self._config, self._clock, self._stop = runner, config, clock, stop
        self._maker = BatchMaker(config)
        rng = np.random.default_rng(seed)
        self._choice = Choice(candidates(config, rng))
        self._share_s = 0.0
        self._drawn = drawn(config, rng)
        self._sizes = by_size(config)[::-1]  # the smallest is the last, taken first
        self._token_s = np.inf  # the least that any batch took for each of its tokens

    def run(self, seconds: float, show: Show = lambda passed_s, text: None) -> Samples:
        """Measure for so long, or until all there is is measured; what went wrong ends it and is told in `ended`."""
        begun_ns = self._clock()
        passed_s = 0.0
        self._share_s = seconds * SHARE_OF_TIME
        self._choice.longest_s = seconds * LONGEST
        try:
            while passed_s < seconds and not self._stop():
                point, purpose = self._next(passed_s >= SIZES_FROM * seconds, seconds - passed_s)
                if point is None:
                    self.samples.ended = "complete"
                    return self.samples
                typical_s = self._measure(point, purpose)
                passed_s = (self._clock() - begun_ns) * 1e-9
                show(passed_s, f"{len(self.samples.purposes)} batches; {_describe(point)}: {typical_s * 1e3:.2f} ms")
        except RuntimeError as error:  # torch: out of memory, a kernel that failed; or a worker died
            self.samples.ended = f"failed: {error}"
        if self._stop():
            self.samples.ended = "interrupted"
        return self.samples

    def _next(self, late: bool, left_s: float) -> tuple[Point | None, Purpose]:
        if late and "sizes" not in self.samples.purposes:
            self._leave_out_sizes(left_s)
        if late and self._sizes:
            return self._sizes.pop(), "sizes"
        count = len(self.samples.purposes)
        if count >= FIRST_JUDGED and count % JUDGED == 0:
            return next(self._drawn), "judge"
        if point := self._choice.next():
            return point, "fit"
        return (self._sizes.pop() if self._sizes else None), "sizes"

    def _leave_out_sizes(self, left_s: float) -> None:
        """The largest, until there is time for the others; of a few nothing can be told."""
        while self._sizes and self._sizes_s() > left_s:
            del self._sizes[0]
        if len(self._sizes) < FEWEST_SIZES:
            self._sizes = []

    def _sizes_s(self) -> float:
        """About how long the sizes left take."""
        repetitions = WARM_UP + LEAST + self._config.depth
        return repetitions * self._token_s * sum(int(point.n_tokens.sum()) for point in self._sizes)

    def _measure(self, point: Point, purpose: Purpose) -> float:
        """Returns the median interval, 0 if it was stopped before there was one."""
        batch = self._maker.make(point)
        timings = self._repeat(batch)
        if not timings:
            return 0.0
        self.samples.add(batch, timings, purpose)
        typical_s = float(np.median([timing.interval_s for timing in timings]))
        self._token_s = min(self._token_s, typical_s / int(point.n_tokens.sum()))
        if purpose == "fit":
            self._choice.learn(point, typical_s)
        return typical_s

    def _repeat(self, batch: Batch) -> list[Timing]:
        """Launch it back to back, `config.depth` in flight, and leave out the first.

        The last in flight are left out too: no launch delays their stamps, so where the host is what takes long their
        intervals are far too short.
        """
        flight: deque[Pending] = deque()
        timings: list[Timing] = []
        before_ns = self._clock()
        while not self._enough(timings):
            flight.append(self._runner.launch(batch))
            if len(flight) == self._config.depth:
                result, now_ns = flight.popleft().result(), self._clock()
                device_s = max((stage.busy_s for stage in result.stages), default=result.device_s)
                timings.append(Timing(device_s, (now_ns - before_ns) * 1e-9))
                before_ns = now_ns
        for pending in flight:
            pending.result()
        return timings[WARM_UP:]

    def _enough(self, timings: list[Timing]) -> bool:
        if self._stop():
            return True
        seconds = np.array([timing.interval_s for timing in timings[WARM_UP:]])
        if seconds.sum() >= self._share_s:
            return len(seconds) >= FEW
        if len(seconds) < LEAST or len(seconds) >= MOST:
            return len(seconds) >= MOST
        median = float(np.median(seconds))
        spread = 1.4826 * float(np.median(np.abs(seconds - median)))
        return bool(1.2533 * spread / np.sqrt(len(seconds)) <= STABLE * median)  # of a median of normal noise


@contextmanager
def progress(seconds: float) -> Iterator[Show]:
    """A bar on stderr that follows a sweep."""
    columns = (TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn())
    with Progress(*columns, console=Console(stderr=True)) as bar:
        task = bar.add_task("first batches", total=seconds)
        yield lambda passed_s, text: bar.update(task, completed=passed_s, description=text)


def _describe(point: Point) -> str:
    decodes = f"{point.decodes} decodes at {point.decode_context}" if point.decodes else ""
    prompts = f"{point.prefills} x {point.chunk} at {point.prefix}" if point.prefills else ""
    return " + ".join(filter(None, (decodes, prompts)))
