"""How numba compiles the hot loops that the live engine and the simulator share.

Numba counts references of arrays, also of those in tuples, each time that one is used: for state kept in many small
arrays that was two thirds of the time. Code that only reads and writes the arrays it is given needs no counting, and is
compiled without it; should it allocate, numba refuses to compile it.
"""

import contextlib
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar, cast

import numba

F = TypeVar("F", bound=Callable[..., Any])

OPTIONS: dict[str, Any] = {"cache": True, "nogil": True, "_nrt": False}


def compiled(function: F) -> F:
    """A function of numbers and arrays, compiled at its first call and kept on disk."""
    return cast(F, numba.njit(**OPTIONS)(function))


def inlined(function: F) -> F:
    """The same, as a part of its caller: for functions of a large state, whose passing would cost more than they do."""
    return cast(F, numba.njit(**OPTIONS, inline="always")(function))


def _forget_stale_machine_code() -> None:
    """Numba's index of a file knows of changes in that file alone, but what it compiled has others' functions in it."""
    engine, envs = Path(__file__).parent, Path(__file__).parent.parent / "envs"
    newest = max(path.stat().st_mtime for path in (Path(__file__), engine / "batching.py", *envs.glob("*.py")))
    for index in (index for room in (engine, envs) for index in room.glob("__pycache__/*.nbi")):
        with contextlib.suppress(OSError):  # another process was faster, or the folder is not ours
            if index.stat().st_mtime < newest:
                index.unlink()


_forget_stale_machine_code()
