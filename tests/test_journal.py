"""The journal: complete parts on disk, whatever dies."""

import os
import signal
from collections.abc import Iterator
from pathlib import Path
from time import monotonic_ns

import msgspec
import pyarrow.parquet as pq
import pytest
from live import wait_for
from plant import Loop

from controller.journal import Journal, JournalRow


def rows(n: int) -> list[JournalRow]:
    loop = Loop("static:budget=64")
    for i in range(n):
        if not loop.core.scheduler.has_work:
            loop.submit(str(i), 100, 5)
        loop.step()
    return list(loop.journal[:n])


@pytest.fixture
def journal(tmp_path: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Journal]:
    sockets = tmp_path_factory.mktemp("s")
    journal = Journal(tmp_path, sockets, monotonic_ns)
    yield journal
    journal.close()


def ignores(pid: int, number: signal.Signals) -> bool:
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    mask = int(next(line.split()[1] for line in lines if line.startswith("SigIgn")), 16)
    return bool(mask >> (number - 1) & 1)


def stored(folder: Path) -> list[int]:
    parts = sorted(folder.glob("part-*.parquet"))
    return [row["knobs"]["sequence"] for part in parts for row in pq.read_table(part).to_pylist()]


def test_every_row_is_on_disk_when_the_journal_is_closed(journal: Journal, tmp_path: Path) -> None:
    written = rows(300)
    for row in written:
        journal.record(row)
    journal.close()
    assert stored(tmp_path) == [row.knobs.sequence for row in written if row.knobs]
    assert not list(tmp_path.glob("*.partial"))
    assert journal.lost_rows == 0


def test_a_row_comes_back_as_it_was(journal: Journal, tmp_path: Path) -> None:
    written = rows(30)
    assert any(c.tbt_slots for row in written for c in row.telemetry.completed)
    assert any(c.finished for row in written for c in row.telemetry.completed)
    for row in written:
        journal.record(row)
    journal.close()
    stored_rows = [row for part in sorted(tmp_path.glob("part-*")) for row in pq.read_table(part).to_pylist()]
    assert msgspec.convert(stored_rows, list[JournalRow]) == written


def test_a_part_never_overwrites_another(tmp_path: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    for _ in range(3):
        journal = Journal(tmp_path, tmp_path_factory.mktemp("s"), monotonic_ns)
        journal.record(rows(1)[0])
        journal.close()
    (tmp_path / "part-00000.parquet").unlink()
    journal = Journal(tmp_path, tmp_path_factory.mktemp("s"), monotonic_ns)
    journal.record(rows(1)[0])
    journal.close()
    assert [p.name for p in sorted(tmp_path.glob("part-*"))] == [f"part-0000{i}.parquet" for i in (1, 2, 3)]


def test_a_signal_to_the_whole_group_does_not_end_the_writer_first(journal: Journal, tmp_path: Path) -> None:
    pid = journal._writer.pid
    assert pid is not None
    journal.record(rows(1)[0])
    wait_for(lambda: ignores(pid, signal.SIGTERM), "its handlers")
    for number in (signal.SIGTERM, signal.SIGINT):
        os.kill(pid, number)
    journal.close()
    assert len(stored(tmp_path)) == 1


def test_rows_that_come_before_the_writer_is_ready_are_kept(journal: Journal, tmp_path: Path) -> None:
    journal.record(rows(1)[0])
    assert journal.lost_rows == 0
    journal.close()
    assert len(stored(tmp_path)) == 1


def test_a_dead_writer_does_not_keep_the_controller_from_ending(journal: Journal) -> None:
    journal._writer.kill()
    journal._writer.join()
    for row in rows(20):
        journal.record(row)
    journal.close()
    assert journal._writer.exitcode == -signal.SIGKILL
