"""The database of studies, refused in one sentence and begun by several processes at once; and the processes' pool."""

import os
import signal
import sqlite3
import subprocess
import sys
from pathlib import Path

import psutil
import pytest
from test_tune import search
from test_tune_processes import ENV

from profiles.parallel import in_parallel, worker_pool
from profiles.tune_objective import runs_of
from profiles.tune_storage import open_storage, shown
from profiles.tune_study import Progress, Search


@pytest.mark.parametrize(
    ("url", "message"),
    [
        ("sqlite:////nonexistent/x.db", "/nonexistent/x.db cannot be used: .*No such file"),
        ("foo", "'foo' is no database URL"),
        ("redis://localhost", "redis://localhost cannot be used: "),
        ("sqlite://", "sqlite:// is kept nowhere: name a file"),
        ("sqlite:///{}/text.db", "text.db cannot be used: .*not a database"),
        ("sqlite:///{}/old.db", "old.db cannot be used: "),
    ],
)
def test_a_storage_that_will_not_do_is_refused_with_the_remedy(url: str, message: str, tmp_path: Path) -> None:
    (tmp_path / "text.db").write_text("this is no database " * 100)
    with sqlite3.connect(tmp_path / "old.db") as old:
        old.execute("CREATE TABLE version_info (version_info_id INTEGER PRIMARY KEY, schema_version INTEGER)")
        old.execute("INSERT INTO version_info VALUES (1, 1)")
    with pytest.raises(ValueError, match=message):
        open_storage(url.format(tmp_path))


def test_a_password_is_not_told() -> None:
    assert shown("postgresql://user:secret@localhost/db") == "postgresql://user:***@localhost/db"
    with pytest.raises(ValueError, match=r"postgresql://user:\*\*\*@localhost") as refused:
        open_storage("postgresql://user:secret@localhost:1/db")
    assert "secret" not in str(refused.value)


def begin(one: Search) -> Progress:
    first, *others = one.objective.space.guesses(256)
    return one.begin([one.objective.as_trial(first)], others)


def test_processes_that_begin_one_study_at_once_enter_its_trials_once(tmp_path: Path) -> None:
    one = search(tmp_path)
    with worker_pool(4) as pool:
        list(in_parallel(pool, abs, [1] * 4))  # all are up: each gets one
        list(in_parallel(pool, begin, [one] * 4))
    trials = one.study().trials
    assert len(trials) == len(one.objective.space.guesses(256))
    assert runs_of([t for t in trials if t.state.is_finished()]) == one.objective.reference.runs


def doubled(values: list[float]) -> int:
    return 2 * len(values)


def test_a_worker_that_dies_ends_the_work_and_not_the_patience() -> None:
    big = [[0.0] * 100_000] * 30  # more than a pipe holds
    with pytest.raises(ChildProcessError, match="a worker process died"), worker_pool(2) as pool:
        for number, result in in_parallel(pool, doubled, big):
            assert result == 200_000
            if number == 3:
                os.kill(pool[0].process.pid or 0, signal.SIGKILL)


def test_what_a_task_raises_is_raised_here() -> None:
    with pytest.raises(ValueError, match="invalid literal") as raised, worker_pool(1) as pool:
        list(in_parallel(pool, int, ["1", "x"]))
    assert "Traceback" in raised.value.__notes__[0]


PARENT = """
import time
from profiles.parallel import in_parallel, worker_pool
if __name__ == "__main__":
    with worker_pool(2) as pool:
        print("up", flush=True)
        list(in_parallel(pool, time.sleep, [0.2] * 1000))
"""


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_workers_end_with_the_one_they_work_for(number: signal.Signals) -> None:
    with subprocess.Popen([sys.executable, "-c", PARENT], env=ENV, stdout=subprocess.PIPE) as parent:
        assert parent.stdout is not None and parent.stdout.readline() == b"up\n"
        workers = psutil.Process(parent.pid).children()
        parent.send_signal(number)
        parent.wait(20)
        _, left = psutil.wait_procs(workers, timeout=20)
    assert len(workers) >= 2 and not left
