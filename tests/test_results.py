"""The results file: bit for bit what was written or one line that says why not, whatever happens to it."""

import math
import os
import random
import shutil
import signal
import sqlite3
import struct
import subprocess
import sys
from contextlib import closing
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from bnn_utils.campaign.results import COLUMNS, ResultsError, opened

ROOT = Path(__file__).parents[1]
FINGERPRINT = {"network": "net", "seed": "0", "images' SHA-256": "ab" * 32}


def rows_of(trials, repairs=("clip", "none"), probability=1e-3, start=0):
    """Return rows such as a campaign's, sorted as the file gives them; a function of the arguments alone."""
    rows = []
    for trial in range(start, start + trials):
        rng = np.random.default_rng(trial)
        for repair in repairs:
            loss = float([rng.normal(), math.nan, math.inf, -math.inf][trial % 4])
            row = dict(network="net", dataset="ünïcode", storage="float32", repair=repair, probability=probability)
            row |= dict(trial=trial, seed=int(rng.integers(2**32)), flips=int(rng.integers(1000)), loss=loss)
            rows.append(row | dict(accuracy=float(rng.random())))
    return rows


def exact(rows):
    """Return rows in a form in which NaN equals NaN, and only the same bits are equal."""
    return [[struct.pack("d", x) if isinstance(x, float) else x for x in row.values()] for row in rows]


def read(path, fingerprint=FINGERPRINT):
    with opened(path, fingerprint) as results:
        return results.rows


@pytest.fixture
def path(tmp_path):
    with opened(tmp_path / "t.sqlite", FINGERPRINT) as results:
        for start in range(0, 60, 6):
            results.append(rows_of(6, start=start))
    return tmp_path / "t.sqlite"


def test_rows_come_back_bit_for_bit(path):
    assert exact(read(path)) == exact(rows_of(60))
    assert [list(row) for row in read(path)[:1]] == [list(COLUMNS)]


def test_pandas_reads_it_in_one_line(path):
    with closing(sqlite3.connect(path)) as connection:
        table = pd.read_sql("SELECT * FROM trials", connection)
    assert list(table.columns) == [*COLUMNS, "checksum"]
    pd.testing.assert_frame_equal(table.drop(columns="checksum"), pd.DataFrame(rows_of(60)))


def test_a_reader_sees_whole_transactions_while_it_is_written(tmp_path):
    with opened(tmp_path / "t.db", FINGERPRINT) as results, closing(sqlite3.connect(tmp_path / "t.db")) as reader:
        for start in range(3):
            results.append(rows_of(1, start=start))
            assert reader.execute("SELECT COUNT(*) FROM trials").fetchone() == (2 * start + 2,)


def test_rows_that_come_again_are_there_once(path):
    with opened(path, FINGERPRINT) as results:
        results.append(rows_of(8, start=56))
    assert exact(read(path)) == exact(rows_of(64))


def test_a_journal_left_behind_by_a_deleted_file_does_no_harm(path):
    content = path.read_bytes()
    path.unlink()
    Path(f"{path}-journal").write_bytes(bytes.fromhex("d9d505f920a163d7") + content)
    assert read(path) == []


# Damage


def damaged_or_whole(path):
    """Open a file that was tampered with: the rows as they were, or one line that names the file."""
    try:
        rows = read(path)
    except ResultsError as error:
        assert str(path) in str(error) and "\n" not in str(error)
        return "told"
    assert exact(rows) == exact(rows_of(60))
    return "whole"


def test_every_truncation_is_told(path):
    content = path.read_bytes()
    copy = path.with_name("copy.sqlite")
    for length in {*range(0, len(content), 211), *range(0, len(content), 512), len(content) - 1}:
        copy.write_bytes(content[:length])
        assert damaged_or_whole(copy) == "told", length


def test_a_flipped_bit_is_told_or_does_no_harm(path):
    content = path.read_bytes()
    copy = path.with_name("copy.sqlite")
    rng = random.Random(0)
    bits = {*range(0, 800, 3), *rng.sample(range(8 * len(content)), 1200)}
    seen = []
    for bit in sorted(bits):
        flipped = bytearray(content)
        flipped[bit // 8] ^= 1 << bit % 8
        copy.write_bytes(flipped)
        seen.append(damaged_or_whole(copy))
    assert {"told", "whole"} == set(seen)


@pytest.mark.parametrize(
    "change",
    [
        "DELETE FROM trials WHERE trial = 7",
        "UPDATE trials SET accuracy = accuracy + 1e-16 WHERE trial = 3",
        "UPDATE trials SET loss = 0 WHERE trial = 1",
        "UPDATE trials SET trial = 99 WHERE trial = 3",
        "UPDATE campaign SET value = '118' WHERE name = 'rows'",
        "DELETE FROM campaign WHERE name = 'rows'",
        "UPDATE campaign SET value = NULL WHERE name = 'network'",
        "INSERT INTO campaign VALUES ('more', 'x')",
        "CREATE TABLE more (x)",
        "DROP TABLE trials",
    ],
)
def test_a_change_that_keeps_the_file_sound_is_told(path, change):
    with closing(sqlite3.connect(path)) as connection, connection:
        assert connection.execute(change) is not None
    assert damaged_or_whole(path) == "told"


@pytest.mark.parametrize("content", [b"", b"x" * 5000, b"network,dataset\n1,2\n", b"SQLite format 3\0" + bytes(5000)])
def test_other_files(tmp_path, content):
    path = tmp_path / "t.sqlite"
    path.write_bytes(content)
    assert damaged_or_whole(path) == "told"
    assert path.read_bytes() == content


def test_a_folder(tmp_path):
    assert damaged_or_whole(tmp_path) == "told"


def test_another_campaign_is_told_line_by_line(path):
    before = path.read_bytes()
    for change, said in [
        ({"seed": "1"}, "seed: 0 there, 1 here"),
        ({"seed": "1", "network": "other"}, "network: net there, other here; seed: 0 there, 1 here"),
        ({"new": "x"}, "new: nothing there, x here"),
    ]:
        with pytest.raises(ResultsError) as caught:
            read(path, FINGERPRINT | change)
        assert str(caught.value) == f"{path}: is of another campaign: {said}"
    assert path.read_bytes() == before


# One writer, who may be killed, or find the disk full


def child(script, *arguments, **options):
    """Start a Python process that appends to results files; `rows_of` is there."""
    start = "import sys\nfrom test_results import *\n"
    environment = {**os.environ, "PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'tests'}"}
    command = [sys.executable, "-c", start + script, *map(str, arguments)]
    return subprocess.Popen(
        command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, **options
    )


HOLD = """
with opened(sys.argv[1], FINGERPRINT) as results:
    print("open", flush=True)
    sys.stdin.read()
"""
APPEND = """
with opened(sys.argv[1], FINGERPRINT) as results:
    for start in range(len(results.rows) // 2, 10**6, 2):
        results.append(rows_of(2, start=start))
        print(start + 2, flush=True)
"""


@pytest.mark.posix
def test_a_second_writer_is_refused_at_once_until_the_first_is_gone(path):
    with opened(path, FINGERPRINT), pytest.raises(ResultsError, match="another process"):
        read(path)
    process = child(HOLD, path, stdin=subprocess.PIPE)
    assert process.stdout.readline() == "open\n"
    with pytest.raises(ResultsError, match="another process") as caught:
        read(path)
    assert str(path) in str(caught.value)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert len(read(path)) == 120


@pytest.mark.posix
def test_killed_at_any_moment_it_leaves_whole_transactions(tmp_path):
    path = tmp_path / "t.sqlite"
    rng = random.Random(1)
    reached = 0
    for _ in range(4):
        process = child(APPEND, path)
        told = 0
        for _ in range(rng.randrange(1, 12)):
            told = int(process.stdout.readline())
        process.send_signal(signal.SIGKILL)
        rest, _ = process.communicate()
        told = int((rest.splitlines() or [told])[-1])
        rows = read(path)
        assert exact(rows) == exact(rows_of(len(rows) // 2))
        assert len(rows) % 4 == 0 and max(told, reached) <= len(rows) // 2 <= told + 2
        reached = len(rows) // 2


def check_full(process, path):
    """Read what a process says that ran out of room, and see that the rows before are there."""
    out, err = process.communicate(timeout=60)
    last = err.splitlines()[-1]
    assert last.startswith(f"OSError: {path}: cannot be written (") and last.endswith("written before is kept there")
    told = int(out.splitlines()[-1])
    return told


@pytest.mark.posix
def test_a_file_that_may_not_grow(tmp_path):
    path = tmp_path / "t.sqlite"
    limit = "import resource; resource.setrlimit(resource.RLIMIT_FSIZE, (60000, 60000))\n"
    told = check_full(child(limit + APPEND, path), path)
    assert exact(read(path)) == exact(rows_of(told))


def test_a_full_disk(tmp_path):
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = shutil.which("mount")
    if (
        not mount
        or subprocess.run([mount, "-t", "tmpfs", "-o", "size=96k", "tmpfs", disk], capture_output=True).returncode
    ):
        pytest.skip("mounting a small disk is not possible here")
    try:
        path = disk / "t.sqlite"
        told = check_full(child(APPEND, path), path)
        assert exact(read(path)) == exact(rows_of(told))
    finally:
        subprocess.run(["umount", disk], check=True)


def test_a_place_that_cannot_be_written(path):
    with pytest.raises(OSError, match="inside"), opened(path / "inside.sqlite", FINGERPRINT):
        pass
