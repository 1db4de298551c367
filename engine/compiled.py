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
SOURCES = (Path(__file__), Path(__file__).parent / "batching.py", *Path(__file__).parent.parent.glob("envs/*.py"))
NEWEST_SOURCE = max(path.stat().st_mtime for path in SOURCES)


def compiled(function: F) -> F:
    """A function of numbers and arrays, compiled at its first call and kept on disk."""
    return cast(F, _fresh(numba.njit(**OPTIONS)(function)))


def inlined(function: F) -> F:
    """The same, as a part of its caller: for functions of a large state, whose passing would cost more than they do."""
    return cast(F, _fresh(numba.njit(**OPTIONS, inline="always")(function)))


def counted(function: F) -> F:
    """With reference counts: for code that allocates, or keeps typed lists."""
    return cast(F, _fresh(numba.njit(cache=True, nogil=True)(function)))


def _fresh(dispatcher: Any) -> Any:
    """Forget machine code older than any source that may be in it.

    Numba's index of a file knows of changes in that file alone, but what it compiled has others' functions in it.
    """
    stats = getattr(dispatcher, "stats", None)
    if stats is None:  # NUMBA_DISABLE_JIT
        return dispatcher
    for index in Path(stats.cache_path).glob(f"*.{dispatcher.py_func.__name__}-*.nbi"):
        with contextlib.suppress(OSError):  # another process was faster, or the folder is not ours
            if index.stat().st_mtime < NEWEST_SOURCE:
                index.unlink()
    return dispatcher
