"""Pure tasks over processes, which are gone when the work is done or interrupted.

Not the standard library's pools: `multiprocessing.Pool` waits for ever for a worker that was killed, and so may
`ProcessPoolExecutor` for one that was killed with a large task on its way. Here every worker has a pipe of its own.
"""

import logging
import multiprocessing
import os
import signal
import traceback
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from multiprocessing import resource_tracker
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from typing import TypeVar

Task = TypeVar("Task")
Result = TypeVar("Result")


@dataclass
class Worker:
    process: BaseProcess
    pipe: Connection
    busy: bool = False


Pool = list[Worker]


@contextmanager
def worker_pool(processes: int | None = None) -> Iterator[Pool]:
    """Processes, by default one for each processor. They are gone when the context is left, however it is left.

    For the main thread: meanwhile SIGTERM raises KeyboardInterrupt in it, as Ctrl-C does.
    """
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)
    pool: Pool = []
    try:
        _start(pool, processes or os.cpu_count() or 1)
        yield pool
    except BaseException:
        for worker in pool:
            worker.process.terminate()
        raise
    finally:
        for worker in pool:
            worker.pipe.close()  # which ends it
        for worker in pool:
            worker.process.join()
        signal.signal(signal.SIGTERM, before)


def in_parallel(pool: Pool, work: Callable[[Task], Result], tasks: Iterable[Task]) -> Iterator[tuple[int, Result]]:
    """The result of each task with its number, as they come. The tasks are pure: where they run changes nothing.

    A task is taken from `tasks` when there is a worker for it. Raises what the task raised, and ChildProcessError when
    a worker dies; the pool is of no use then, nor when this is left halfway.
    """
    assert not any(worker.busy for worker in pool)
    numbered, numbers = enumerate(tasks), dict[Connection, int]()
    free = list(pool)
    while True:
        while free and (task := next(numbered, None)):
            worker = free.pop()
            worker.busy = True
            numbers[worker.pipe] = task[0]
            _talk(worker.pipe.send, (work, task[1]))
        busy = [worker for worker in pool if worker.busy]
        if not busy:
            return
        ready = wait([worker.pipe for worker in busy])
        for worker in busy:
            if worker.pipe in ready:
                result, error = _talk(worker.pipe.recv)
                if error is not None:
                    raise error
                worker.busy = False
                free.append(worker)
                yield numbers[worker.pipe], result


def _talk(do: Callable[..., Result], *values: object) -> Result:
    try:
        return do(*values)
    except (EOFError, ConnectionError) as error:
        raise ChildProcessError(
            "a worker process died: it was killed, perhaps for want of memory (then ask for fewer --processes). What "
            "was finished is kept: the same command goes on"
        ) from error


def _start(pool: Pool, processes: int) -> None:
    """Ctrl-C goes to all processes of a terminal; the one that waits for the others answers it for all.

    So it is held back here meanwhile, and in them for good, as they inherit that.
    """
    context = multiprocessing.get_context("spawn")
    resource_tracker.ensure_running()  # else it is started with the first process, and lets Ctrl-C through again
    held = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        for _ in range(processes):
            ours, theirs = context.Pipe()
            process = context.Process(target=_serve, args=(theirs,), daemon=True)
            process.start()
            pool.append(Worker(process, ours))
            theirs.close()  # so that each side hears of the other's end
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, held)


def _serve(pipe: Connection) -> None:
    """A worker: until there is no one to work for."""
    logging.getLogger("policies.guard").setLevel(logging.ERROR)  # searches overload, and overload looks like lock-in
    while True:
        try:
            work, task = pipe.recv()
        except EOFError:
            return
        answer: tuple[object, Exception | None]
        try:
            answer = work(task), None
        except Exception as error:
            error.add_note(traceback.format_exc())
            answer = None, error
        try:
            pipe.send(answer)
        except ConnectionError:
            return
