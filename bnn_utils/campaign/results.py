"""The file that a campaign writes as it runs: SQLite, a row a trial and repair, each with a checksum.

This reads it, also while the campaign runs; a number that is NaN is NULL in the file:

    pd.read_sql("SELECT * FROM trials", sqlite3.connect("sweep.sqlite"))
"""

import hashlib
import json
import math
import os
import sqlite3
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from functools import partial
from pathlib import Path
from typing import Any

from bnn_utils.system import only_one, write_beside

Row = dict[str, Any]

ENDINGS = (".sqlite", ".db")
_TYPES = {
    "network": "TEXT",
    "dataset": "TEXT",
    "storage": "TEXT",
    "repair": "TEXT",
    "probability": "REAL",
    "trial": "INTEGER",
    "seed": "INTEGER",
    "flips": "INTEGER",
    "loss": "REAL",
    "accuracy": "REAL",
}
COLUMNS = list(_TYPES)
_TYPED = ", ".join(f"{name} {kind}" for name, kind in _TYPES.items())
_SCHEMA = [  # in the order of the names
    "CREATE TABLE campaign (name TEXT PRIMARY KEY, value TEXT) WITHOUT ROWID",
    f"CREATE TABLE trials ({_TYPED}, checksum TEXT, PRIMARY KEY (probability, trial, repair)) WITHOUT ROWID",
]
_WAIT = 60.0  # seconds for which somebody who reads the file may hold up the writer


class ResultsError(ValueError):
    """A results file cannot be gone on with; the message says which one and why."""


class Results:
    """A results file that is open for writing, see `opened`.

    Attributes:
        path: of the file.
        rows: what it held when it was opened, sorted by probability, trial and name of the repair.
    """

    def __init__(self, path: Path, connection: sqlite3.Connection, fingerprint: Mapping[str, str]):
        self.path, self._connection, self._fingerprint = path, connection, dict(fingerprint)
        self.rows = _verified(path, connection, self._fingerprint)

    def append(self, rows: Sequence[Row]) -> None:
        """Add rows in one transaction: all of them are in the file, or none is. Rows that are there stay as they are.

        Raises:
            OSError: they cannot be written, on a full disk for example; what was written before is still there.
        """
        key = _key(self._fingerprint)
        lines = [(*(row[name] for name in COLUMNS), _checksum(row, key)) for row in rows]
        places = ", ".join("?" * (len(COLUMNS) + 1))
        connection = self._connection
        try:
            with connection:
                (told,) = connection.execute("SELECT value FROM campaign WHERE name = 'rows'").fetchone()
                before = connection.total_changes
                # Rows come twice where Ctrl-C fell between their commit and the end of this function.
                connection.executemany(f"INSERT OR IGNORE INTO trials VALUES ({places})", lines)
                counted = _counted(self._fingerprint, int(told) + connection.total_changes - before)
                facts = [(value, name) for name, value in counted.items()]
                connection.executemany("UPDATE campaign SET value = ? WHERE name = ?", facts)
        except sqlite3.Error as error:
            raise OSError(f"{self.path}: cannot be written ({error}); what was written before is kept there") from None


@contextmanager
def opened(path: str | os.PathLike[str], fingerprint: Mapping[str, str]) -> Iterator[Results]:
    """Open a results file as its only writer, until the context ends; make it if it is not there.

    All that the file holds is verified: SQLite's own structure, the checksum of every row, their number. A process
    that is killed, at whatever moment, leaves a file that opens, with the rows of whole transactions.

    Args:
        path: of the file; beside it lies an empty one, with ".lock" added to the name, that tells who writes.
        fingerprint: what identifies the campaign, a line of text a name. Rows of another one are never added.

    Raises:
        ResultsError: another process writes the file, it is damaged or another kind of file, or its fingerprint
            differs; the message then gives the lines that do.
        OSError: the file cannot be made.
    """
    path = Path(path)
    held = ResultsError(f"{path}: another process is writing this file; wait for it, or name another file")
    with only_one(path.with_name(f"{path.name}.lock"), held):
        if not path.exists():
            # SQLite would take a journal that a deleted file has left behind for that of the new one, and roll back
            # pages that the new one never had. See sqlite.org/howtocorrupt.html, of files and journals that part.
            path.with_name(f"{path.name}-journal").unlink(missing_ok=True)
            write_beside(path, partial(_create, fingerprint=fingerprint))
        try:
            place = f"{path.absolute().as_uri()}?mode=rw"  # which makes no empty file
            connection = sqlite3.connect(place, uri=True, timeout=_WAIT)
        except sqlite3.Error as error:
            raise _damaged(path, error) from None
        with closing(connection):
            yield Results(path, connection, fingerprint)


def _create(path: Path, fingerprint: Mapping[str, str]) -> None:
    try:
        with closing(sqlite3.connect(path)) as connection, connection:
            for statement in _SCHEMA:
                connection.execute(statement)
            facts = {**fingerprint, **_counted(fingerprint, 0)}
            connection.executemany("INSERT INTO campaign VALUES (?, ?)", facts.items())
    except sqlite3.Error as error:
        raise OSError(f"{path}: cannot be written ({error})") from None


def _key(fingerprint: Mapping[str, str]) -> bytes:
    return hashlib.sha256(json.dumps(sorted(fingerprint.items())).encode()).digest()


def _counted(fingerprint: Mapping[str, str], count: int) -> dict[str, str]:
    """Return the two lines beside the fingerprint: the number of rows, and a checksum of it and the fingerprint."""
    return {"rows": str(count), "checksum": hashlib.sha256(_key(fingerprint) + str(count).encode()).hexdigest()}


def _checksum(row: Row, key: bytes) -> str:
    """Return the checksum of a row of the campaign that has this key."""
    exact = [value.hex() if isinstance(value, float) else value for value in (row[name] for name in COLUMNS)]
    return hashlib.blake2b(repr(exact).encode(), digest_size=8, key=key).hexdigest()


def _damaged(path: Path, reason: object) -> ResultsError:
    return ResultsError(f"{path}: is damaged or not a results file ({' '.join(str(reason).split())})")


def _verified(path: Path, connection: sqlite3.Connection, fingerprint: Mapping[str, str]) -> list[Row]:
    """Return the rows of a file in which everything agrees."""
    try:
        connection.execute("PRAGMA journal_mode = DELETE")  # a flipped bit could ask for another
        if [sql for (sql,) in connection.execute("SELECT sql FROM sqlite_master ORDER BY sql")] != _SCHEMA:
            raise _damaged(path, "its tables are others")
        (told,) = connection.execute("PRAGMA integrity_check(1)").fetchone()
        if told != "ok":
            raise _damaged(path, told)
        facts = dict(connection.execute("SELECT name, value FROM campaign"))
        lines = connection.execute(f"SELECT {', '.join(COLUMNS)}, checksum FROM trials").fetchall()
    except (sqlite3.Error, UnicodeError) as error:
        raise _damaged(path, error) from None
    counts = {name: facts.pop(name, None) for name in ("rows", "checksum")}
    rows = [dict(zip(COLUMNS, values, strict=True)) for *values, _ in lines]
    if not all(isinstance(text, str) for text in (*facts, *facts.values())) or counts != _counted(facts, len(rows)):
        raise _damaged(path, "the number of its rows or the campaign's description is wrong")
    if facts != fingerprint:
        differing = [
            f"{name}: {facts.get(name, 'nothing')} there, {fingerprint.get(name, 'nothing')} here"
            for name in {**fingerprint, **facts}
            if facts.get(name) != fingerprint.get(name)
        ]
        raise ResultsError(f"{path}: is of another campaign: {'; '.join(differing)}")
    key = _key(fingerprint)
    for row, (*_, checksum) in zip(rows, lines, strict=True):
        row |= {name: math.nan for name in ("loss", "accuracy") if row[name] is None}  # SQLite has no NaN
        if _checksum(row, key) != checksum:
            raise _damaged(path, f"a row does not have its checksum: {row}")
    return rows
