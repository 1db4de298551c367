"""Tasks that are done once: in parallel, their results kept in a file, so that an interrupted benchmark goes on."""

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Protocol

import msgspec
from rich.console import Console
from rich.progress import track

from profiles.parallel import Pool, in_parallel

Result = dict[str, float]


class Task(Protocol):
    """Pure work for another process."""

    def key(self) -> str: ...

    def do(self) -> Result: ...


class Done:
    """Does tasks in parallel, and remembers their results in a file of JSON lines; a line cut short is done again."""

    def __init__(self, pool: Pool, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
        whole, _, cut = path.read_bytes().rpartition(b"\n")
        if cut:
            path.write_bytes(whole + b"\n" if whole else b"")
        self._pool, self._path = pool, path
        self._known = dict(msgspec.json.decode(line, type=tuple[str, Result]) for line in whole.splitlines())

    def do(self, tasks: Sequence[Task], what: str) -> list[Result]:
        """The results in the order of the tasks."""
        keys = [task.key() for task in tasks]
        missing = {key: task for key, task in zip(keys, tasks, strict=True) if key not in self._known}
        names, work = list(missing), list(missing.values())
        if work:
            console = Console(stderr=True)
            for number, result in track(in_parallel(self._pool, do, work), what, len(work), console=console):
                self._known[names[number]] = result
                with self._path.open("ab") as file:
                    file.write(msgspec.json.encode((names[number], result)) + b"\n")
        return [self._known[key] for key in keys]


def do(task: Task) -> Result:
    logging.getLogger("policies.guard").setLevel(logging.ERROR)  # a search overloads, and overload looks like lock-in
    return task.do()
