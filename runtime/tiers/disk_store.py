"""The second tier: blocks in a file that outlives the process.

The store is an SQLite database: its write-ahead log makes each write whole or absent, whenever the process ends. Every
row carries a checksum over its key and its content, and is compared with the key that is asked for. Whatever is broken,
cut short, or not ours is a miss; a file that is no store of this format is set aside, and a new one is begun.
"""

from __future__ import annotations

import os
import sqlite3
import threading
import warnings
from collections import OrderedDict
from collections.abc import Iterable
from contextlib import closing, suppress
from hashlib import blake2b
from pathlib import Path

import numpy as np

from kvpass.errors import KvpassWarning
from kvpass.runtime.tiers.host_memory import BlockKey, Payload, StoredBlock

FILE_NAME = "kvpass-blocks.sqlite"
# Another layout of the table or of the checksum needs another number.
_FORMAT = 2  # 1 held int4 rows without offsets
_APPLICATION = 0x6B767073
_PAGE = 16384
_CHECK_BYTES = 16
# Bytes of a row beside its tokens and its content, about; rows begin on pages of their own once they are large.
_ROW_BYTES = 1024
_BUSY_SECONDS = 5.0

_TABLE = """
CREATE TABLE IF NOT EXISTS blocks (
    digest BLOB NOT NULL UNIQUE, size INTEGER NOT NULL, used INTEGER NOT NULL, namespace TEXT NOT NULL,
    part INTEGER NOT NULL, checksum BLOB NOT NULL, tokens BLOB NOT NULL, payload BLOB NOT NULL
)
"""
# All that is read when the store is opened, so that no content has to be.
_ORDER = "CREATE INDEX IF NOT EXISTS in_order ON blocks (used, digest, size)"


class DiskStore:
    """Blocks in a file of the folder ``path``, in at most ``capacity`` bytes; what was used longest ago makes room.

    Any thread may call. No method raises for what the file holds or the disk refuses; a store that cannot be used at
    all holds nothing, after one warning.

    Attributes:
        capacity: most bytes of rows; the file has no more than a tenth on top.
        size: bytes of rows.
        errors: times that something was broken, or refused by the disk.
    """

    def __init__(self, path: str | Path, capacity: int, wipe: bool = False) -> None:
        """Open the store, or begin one. With ``wipe`` what is deleted is overwritten with zeros in the file."""
        self.path = Path(path) / FILE_NAME
        self.capacity = capacity
        self.size = 0
        self.errors = 0
        self._wipe = wipe
        # Held while the file is at work.
        self._lock = threading.RLock()
        # Held while the books change, which takes no time: the digests in the order in which they make room, with the
        # bytes of their rows.
        self._books = threading.Lock()
        self._rows: OrderedDict[bytes, int] = OrderedDict()
        self._used = 0
        self._database: sqlite3.Connection | None = None
        self._open()

    def __len__(self) -> int:
        return len(self._rows)

    def __contains__(self, digest: bytes) -> bool:
        """Whether there is a row under ``digest``; whether it is good shows when it is read."""
        return digest in self._rows

    def row_size(self, digest: bytes) -> int:
        """Bytes of the row under ``digest``; 0 if there is none."""
        return self._rows.get(digest, 0)

    def touch(self, digest: bytes) -> bool:
        """The row under ``digest`` was used just now; False if there is none."""
        with self._books:
            if digest not in self._rows:
                return False
            self._rows.move_to_end(digest)
            return True

    def put(self, blocks: Iterable[StoredBlock]) -> None:
        """Write blocks, all or none of them."""
        with self._lock:
            new = {block.key.digest: block for block in blocks if block.key.digest not in self._rows}
            sizes = {digest: _row_size(block) for digest, block in new.items()}
            room = self._make_room(sum(sizes.values()))
            if room is None or not new:
                return
            rows: list[tuple[object, ...]] = []
            for digest, block in new.items():
                self._used += 1
                key, payload = block.key, block.payload.tobytes()
                check = _checksum(key, payload)
                rows.append((digest, sizes[digest], self._used, key.namespace, key.group, check, key.tokens, payload))
            if self._write(room, rows):
                with self._books:
                    for digest in room:
                        self.size -= self._rows.pop(digest)
                    self._rows |= sizes
                    self.size += sum(sizes.values())

    def get(self, key: BlockKey) -> StoredBlock | None:
        """The block of exactly this key, if it is here and good."""
        with self._lock:
            if self._database is None or key.digest not in self._rows:
                return None
            try:
                with closing(self._database.execute(_SELECT, (key.digest,))) as found:
                    row = found.fetchone()
            except (sqlite3.Error, OSError, OverflowError, ValueError) as error:
                self._failed(error)
                return None
            payload = _good_payload(key, row)
            if payload is None:
                self.errors += row is not None
                self._remove([key.digest])
                return None
            return StoredBlock(key, payload)

    def drop(self, namespace: str | None) -> None:
        """Delete the blocks of one namespace; all of them if it is None."""
        with self._lock:
            if self._database is None:
                return
            where, values = ("", ()) if namespace is None else (" WHERE namespace = ?", (namespace,))
            try:
                with self._database:
                    self._database.execute(f"DELETE FROM blocks{where}", values)
                self._load(self._database)
                self._database.execute("PRAGMA wal_checkpoint(TRUNCATE)")
            except (sqlite3.Error, OSError) as error:
                self._begin_anew(error, keep=False)  # what cannot be deleted row by row goes with the file

    def close(self) -> None:
        """Write the order of use, and close the file."""
        with self._lock:
            if self._database is not None:
                order = [(rank, digest) for rank, digest in enumerate(self._rows)]
                with suppress(sqlite3.Error, OSError), closing(self._database), self._database:
                    self._database.executemany("UPDATE blocks SET used = ? WHERE digest = ?", order)
            self._database = None
            self._rows = OrderedDict()
            self.size = 0

    def _open(self) -> None:
        try:
            self._connect()
        except (sqlite3.Error, OSError, ValueError) as error:
            self._begin_anew(error)

    def _connect(self) -> None:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        # What a prompt was can be read from it: nobody else's business.
        os.close(os.open(self.path, os.O_RDWR | os.O_CREAT, 0o600))
        database = sqlite3.connect(self.path, timeout=_BUSY_SECONDS, check_same_thread=False)
        try:
            database.execute(f"PRAGMA page_size = {_PAGE}")
            known = database.execute("PRAGMA application_id").fetchone()[0]
            version = database.execute("PRAGMA user_version").fetchone()[0]
            empty = database.execute("SELECT count(*) FROM sqlite_master").fetchone()[0] == 0
            if not empty and (known, version) != (_APPLICATION, _FORMAT):
                raise ValueError("the file is no store of blocks, or one of another format")
            database.execute("PRAGMA journal_mode = WAL")
            database.execute("PRAGMA synchronous = NORMAL")
            database.execute(f"PRAGMA journal_size_limit = {self.capacity // 20}")
            database.execute(f"PRAGMA secure_delete = {'ON' if self._wipe else 'OFF'}")
            with database:
                database.execute(f"PRAGMA application_id = {_APPLICATION}")
                database.execute(f"PRAGMA user_version = {_FORMAT}")
                database.execute(_TABLE)
                database.execute(_ORDER)
            page = database.execute("PRAGMA page_size").fetchone()[0]
            database.execute(f"PRAGMA max_page_count = {self.capacity * 11 // 10 // page + 16}")
            self._load(database)
        except BaseException:
            database.close()
            raise
        self._database = database

    def _load(self, database: sqlite3.Connection) -> None:
        rows = database.execute("SELECT digest, size, used FROM blocks ORDER BY used").fetchall()
        if not all(isinstance(digest, bytes) and isinstance(size, int) for digest, size, _ in rows):
            raise ValueError("the file holds rows of another kind")
        self._rows = OrderedDict((digest, size) for digest, size, _ in rows)
        self.size = sum(self._rows.values())
        self._used = max((used for _, _, used in rows if isinstance(used, int)), default=0)

    def _make_room(self, size: int) -> list[bytes] | None:
        """Which rows have to go for ``size`` more bytes; None if that much does not fit at all."""
        if self._database is None or size > self.capacity:
            return None
        going: list[bytes] = []
        left = self.size
        with self._books:
            for digest, row in self._rows.items():
                if left + size <= self.capacity:
                    break
                going.append(digest)
                left -= row
        return going

    def _write(self, going: list[bytes], rows: list[tuple[object, ...]]) -> bool:
        if self._database is None:
            return False
        try:
            with self._database:
                self._database.executemany("DELETE FROM blocks WHERE digest = ?", [(digest,) for digest in going])
                self._database.executemany(_INSERT, rows)
        except (sqlite3.Error, OSError, OverflowError) as error:
            self._failed(error)
            return False
        return True

    def _remove(self, digests: list[bytes]) -> None:
        if self._write(digests, []):
            with self._books:
                for digest in digests:
                    self.size -= self._rows.pop(digest, 0)

    def _failed(self, error: Exception) -> None:
        """A full disk or a lock held by somebody else passes; all else means that the file is broken."""
        if isinstance(error, sqlite3.OperationalError) and getattr(error, "sqlite_errorcode", 0) & 0xFF in _PASSING:
            self.errors += 1
        else:
            self._begin_anew(error)

    def _begin_anew(self, error: Exception, keep: bool = True) -> None:
        """Set the file aside, or delete it, and begin another one; with no success, hold nothing from now on."""
        self.errors += 1
        with suppress(sqlite3.Error):
            if self._database is not None:
                self._database.close()
        self._database = None
        self._rows = OrderedDict()
        self.size = 0
        try:
            for suffix in ("-wal", "-shm"):
                Path(f"{self.path}{suffix}").unlink(missing_ok=True)
            if self.path.exists():
                if keep and not self._wipe:
                    self.path.replace(f"{self.path}.broken")
                else:
                    self.path.unlink()
            self._connect()
        except (sqlite3.Error, OSError, ValueError) as second:
            warnings.warn(
                f"no blocks are kept on disk: {self.path} cannot be used ({second}, after {error})",
                KvpassWarning,
                stacklevel=2,
            )


_SELECT = "SELECT namespace, part, checksum, tokens, payload FROM blocks WHERE digest = ?"
_INSERT = (
    "INSERT OR REPLACE INTO blocks (digest, size, used, namespace, part, checksum, tokens, payload) "
    "VALUES (?, ?, ?, ?, ?, ?, ?, ?)"
)
_PASSING = (sqlite3.SQLITE_BUSY, sqlite3.SQLITE_LOCKED, sqlite3.SQLITE_FULL, sqlite3.SQLITE_NOMEM)


def _row_size(block: StoredBlock) -> int:
    return len(block.key.tokens) + block.payload.nbytes + _ROW_BYTES


def _checksum(key: BlockKey, payload: bytes) -> bytes:
    check = blake2b(key.digest, digest_size=_CHECK_BYTES)
    for part in (key.namespace.encode(), str(key.group).encode(), key.tokens, payload):
        check.update(len(part).to_bytes(8, "little"))
        check.update(part)
    return check.digest()


def _good_payload(key: BlockKey, row: tuple[object, ...] | None) -> Payload | None:
    """The content of a row, if the row is that of ``key`` and whole."""
    if row is None or row[:2] != (key.namespace, key.group) or row[3] != key.tokens:
        return None
    check, payload = row[2], row[4]
    if not isinstance(payload, bytes) or check != _checksum(key, payload):
        return None
    return np.frombuffer(payload, dtype=np.uint8)
