"""The engine's side of tensor and pipeline parallelism: starts the ranks, sends them the work, takes their results."""

import logging
import multiprocessing
import tempfile
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, replace
from itertools import product
from pathlib import Path
from typing import NoReturn

import zmq

from engine.config import EngineConfig, ModelSource
from engine.parallel import worker
from engine.parallel.groups import START_S, rank_of
from engine.parallel.messages import REST, STOP, Done, Failed, FromRank, Ready, decode_from_rank, encode
from engine.protocol import StageTimes
from engine.request import Batch, StepResult
from engine.shard import Shard
from engine.step_input import step_input
from engine.step_shapes import PaddedSizes

logger = logging.getLogger(__name__)

PROGRESS_S = 10.0
SETTLE_S = 0.5  # for the ranks that fail because another one did
STOP_S = 10.0


class RankError(RuntimeError):
    """What the rank that failed says, or how it died. All ranks have been ended then."""


class ParallelRunner:
    """A Runner over one process for each rank: every batch goes to all of them, decided once.

    The constructor returns when all ranks have loaded their shards of the model, with `config` as they have settled
    it; they get `clock` pickled. Raises ValueError with the reason when one cannot start. Results must be taken in the
    order of the launches, once each; taking one raises RankError when a rank is gone.
    """

    def __init__(self, source: ModelSource, config: EngineConfig, clock: Callable[[], int]) -> None:
        tensor, stages = config.tensor_parallel, config.pipeline_parallel
        shards = [Shard(t, tensor, stage, stages) for stage, t in product(range(stages), range(tensor))]
        self._folder = tempfile.TemporaryDirectory(
            prefix="pacer-ranks-"
        )  # of mode 0700: nobody else gets at the sockets
        directory = Path(self._folder.name)
        self._context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
        self._reports = self._context.socket(zmq.PULL)
        self._reports.bind(worker.report_address(directory))
        self._inboxes = [self._context.socket(zmq.PUSH) for _ in shards]
        for rank, inbox in enumerate(self._inboxes):
            inbox.connect(worker.work_address(directory, rank))
        self._done: list[deque[Done]] = [deque() for _ in range(stages)]
        self._ready: dict[int, Ready] = {}
        self._in_flight: deque[Batch] = deque()  # oldest first
        self._rests = config.look_ahead and stages > 1
        self._poller = zmq.Poller()
        self._poller.register(self._reports, zmq.POLLIN)
        source = replace(source, threads=max(1, source.threads // len(shards)))
        spawn = multiprocessing.get_context("spawn")
        # Daemons, so that an engine that ends by an exception ends them instead of waiting for them.
        self._ranks = [
            spawn.Process(target=worker.main, args=(s, source, config, directory, clock), name=_name(s), daemon=True)
            for s in shards
        ]
        for process in self._ranks:
            process.start()
            self._poller.register(process.sentinel, zmq.POLLIN)
        try:
            self._wait_until_ready(clock)
        except RankError as error:
            raise ValueError(str(error)) from None
        except BaseException:  # a signal: the ranks must not go on loading
            self._kill()
            raise
        self.config, self.vocab_size = self._ready[0].config, self._ready[0].vocab_size
        self.attention_name = self._ready[0].attention_name
        self._sizes = PaddedSizes(self._ready[0].shapes)

    def launch(self, batch: Batch) -> "Pending":
        step = step_input(batch, self._in_flight)
        self._tell(encode(step))
        self._in_flight.append(batch)
        return Pending(self, len(self._in_flight), self._sizes.padding_tokens(len(step.token_ids), len(step.n_tokens)))

    def take(self, in_flight: int) -> StepResult:
        """Wait for the oldest batch; `in_flight` were on their way when it was launched, itself included."""
        done = [self._next_done(stage) for stage in range(len(self._done))]
        self._in_flight.popleft()
        if self._rests and not self._in_flight:
            self._tell(REST)
        device_s = sum(stage.busy_s for stage in done)
        stages = tuple(StageTimes(stage.busy_s, stage.bubble_s, in_flight) for stage in done)
        return StepResult(done[-1].token_ids, device_s, stages)

    def close(self) -> None:
        """End the ranks, once they have done what is in flight."""
        if self._context.closed:
            return
        self._tell(STOP)
        for process in self._ranks:
            process.join(STOP_S)
            if process.is_alive():
                logger.error("%s did not stop within %.0f s: killed, with all ranks left", process.name, STOP_S)
                break
        self._kill()

    def _tell(self, message: bytes) -> None:
        for inbox in self._inboxes:
            inbox.send(message, copy=False)

    def _kill(self) -> None:
        for process in self._ranks:
            process.kill()
        for process in self._ranks:
            process.join()
        self._context.destroy(linger=0)
        self._folder.cleanup()

    def _wait_until_ready(self, clock: Callable[[], int]) -> None:
        started_ns = clock()
        while len(self._ready) < len(self._ranks):
            if self._take_news(PROGRESS_S):
                continue
            waited_s = (clock() - started_ns) * 1e-9
            missing = ", ".join(process.name for rank, process in enumerate(self._ranks) if rank not in self._ready)
            logger.info("waiting for %s to load the model (%.0f s)", missing, waited_s)
            if waited_s > START_S:
                self._kill()
                raise RankError(f"{missing} did not load the model within {START_S:.0f} s")
        assert len({ready.config for ready in self._ready.values()}) == 1, "the ranks settled on different sizes"

    def _next_done(self, stage: int) -> Done:
        while not self._done[stage]:
            self._take_news(None)
        return self._done[stage].popleft()

    def _take_news(self, timeout_s: float | None) -> bool:
        """Wait for a message, or for the death of a rank. Returns whether there was any."""
        events = dict(self._poller.poll(None if timeout_s is None else int(timeout_s * 1000)))
        if self._reports in events:
            self._book(decode_from_rank(self._reports.recv()))
        elif events:
            self._fail([])
        return bool(events)

    def _book(self, news: FromRank) -> None:
        if isinstance(news, Done):
            self._done[news.stage].append(news)
        elif isinstance(news, Ready):
            self._ready[news.rank] = news
        else:
            self._fail([news])

    def _fail(self, failed: list[Failed]) -> NoReturn:
        """Find out which rank failed first, and end all of them."""
        while events := dict(self._poller.poll(int(SETTLE_S * 1000))):
            for source in events:
                if source is not self._reports:
                    self._poller.unregister(source)
                elif isinstance(news := decode_from_rank(self._reports.recv()), Failed):
                    failed.append(news)
        reason = self._reason(failed)
        self._kill()
        raise RankError(reason)

    def _reason(self, failed: list[Failed]) -> str:
        died = {process.name: process.exitcode for process in self._ranks if process.exitcode is not None}
        killed = {name: status for name, status in died.items() if status < 0}
        if failed and not killed:  # the first to fail is the cause: those that waited for it come later
            reason = failed[0].reason
            names = [self._ranks[news.rank].name for news in failed if news.reason == reason]
            return reason if len(names) == len(self._ranks) else f"{', '.join(names)}: {reason}"
        return "; ".join(f"{name} died with exit status {status}" for name, status in (killed or died).items())


@dataclass(slots=True)
class Pending:
    """A batch on its way through the ranks."""

    runner: ParallelRunner
    in_flight: int
    padding_tokens: int

    def result(self) -> StepResult:
        return self.runner.take(self.in_flight)


def _name(shard: Shard) -> str:
    return f"rank {rank_of(shard)} (stage {shard.pp_rank}, tensor rank {shard.tp_rank})"
