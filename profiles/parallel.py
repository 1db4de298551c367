"""Pure tasks over processes, which are gone when the work is done or interrupted."""

import multiprocessing
import signal
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from multiprocessing.pool import Pool
from typing import Any, TypeVar

Task = TypeVar("Task")
Result = TypeVar("Result")


@contextmanager
def worker_pool(processes: int | None = None) -> Iterator[Pool]:
    """Processes, by default one for each processor. They are gone when the context is left, however it is left."""
    with multiprocessing.get_context("spawn").Pool(processes, _ignore_interrupts) as pool:
        yield pool


def in_parallel(pool: Pool, work: Callable[[Task], Result], tasks: Iterable[Task]) -> Iterator[tuple[int, Result]]:
    """The result of each task with its number, as they come. The tasks are pure: where they run changes nothing."""
    return pool.imap_unordered(_Numbered(work), enumerate(tasks))


class _Numbered:
    def __init__(self, work: Callable[[Any], Any]) -> None:
        self._work = work

    def __call__(self, task: tuple[int, Any]) -> tuple[int, Any]:
        return task[0], self._work(task[1])


def _ignore_interrupts() -> None:
    """Ctrl-C goes to all processes of a terminal; the one that waits for the others answers it for all."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
