"""The database that keeps studies: opened by one process after another, and refused in one sentence."""

import fcntl
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path
from typing import Any

import optuna
from optuna.exceptions import StorageInternalError
from optuna.storages import RDBStorage, RetryHeartbeatStaleTrialCallback
from sqlalchemy import URL, Engine, event, make_url
from sqlalchemy.exc import SQLAlchemyError

HEARTBEAT_S, GRACE_S = 2, 30  # a process may stand still for so long, swapped out, before its trial is taken for dead
LOCK_WAIT_S = 60  # for another process's write to a database of one file


@lru_cache(maxsize=2)
def open_storage(url: str, heartbeat: bool = True) -> RDBStorage:
    """The database, opened once in a process. With `heartbeat`, trials whose process died are begun again.

    Raises ValueError with the remedy if it cannot be opened.
    """
    optuna.logging.set_verbosity(optuna.logging.ERROR)  # what fails is raised, too
    warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
    sqlite = _parsed(url).get_backend_name() == "sqlite"
    try:
        with storage_errors(url), one_at_a_time(url):
            storage = RDBStorage(
                url,
                heartbeat_interval=HEARTBEAT_S if heartbeat else None,
                grace_period=GRACE_S if heartbeat else None,
                heartbeat_stale_trial_callback=RetryHeartbeatStaleTrialCallback() if heartbeat else None,
                engine_kwargs={"connect_args": {"timeout": LOCK_WAIT_S}} if sqlite else None,
            )
            if sqlite:
                _lock_at_once(storage.engine)
    except (ImportError, RuntimeError) as error:  # no driver for such a database; it is of another Optuna
        raise _refusal(url, error) from error
    return storage


@contextmanager
def storage_errors(url: str) -> Iterator[None]:
    """Turns what a database raises into one ValueError, which tells no password."""
    try:
        yield
    except (SQLAlchemyError, StorageInternalError) as error:
        raise _refusal(url, error.__cause__ or error) from error


@contextmanager
def one_at_a_time(url: str) -> Iterator[None]:
    """Of all processes of this machine that use a database of one file: others wait. Nothing, for a server.

    A server's tables are best made by one call before others begin.
    """
    parsed = _parsed(url)
    if parsed.get_backend_name() != "sqlite":
        yield
        return
    if not parsed.database or parsed.database == ":memory:":
        raise ValueError(f"--storage {url} is kept nowhere: name a file, as in sqlite:///study.db")
    try:
        lock = Path(f"{parsed.database}.lock").open("w", encoding="utf-8")  # noqa: SIM115  (below)
    except OSError as error:
        raise _refusal(url, error) from error
    with lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def shown(url: str) -> str:
    """The URL without its password."""
    return _parsed(url).render_as_string(hide_password=True)


def _parsed(url: str) -> URL:
    try:
        return make_url(url)
    except SQLAlchemyError:
        raise ValueError(
            f"--storage {url!r} is no database URL: give one as in sqlite:///study.db or postgresql://USER@HOST/NAME"
        ) from None


def _refusal(url: str, error: BaseException) -> ValueError:
    why = " ".join(str(error).split()) or type(error).__name__
    return ValueError(f"--storage {shown(url)} cannot be used: {why}. Name another, or leave the flag out")


def _lock_at_once(engine: Engine) -> None:
    """SQLite knows no SELECT FOR UPDATE, so that two processes could both take one waiting trial. Lock from the first
    read of a transaction on (https://docs.sqlalchemy.org/en/20/dialects/sqlite.html, pysqlite's transactions).
    """

    def connected(connection: Any, _: Any) -> None:
        connection.isolation_level = None  # transactions are begun below
        connection.execute("PRAGMA journal_mode=WAL")  # a commit need not wait for the disk, and a killed process
        connection.execute("PRAGMA synchronous=NORMAL")  # still loses nothing of it

    def begin(connection: Any) -> None:
        connection.exec_driver_sql("BEGIN IMMEDIATE")

    event.listen(engine, "connect", connected)
    event.listen(engine, "begin", begin)
    engine.dispose()  # of connections that were made before
