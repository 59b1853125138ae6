"""Where evicted blocks go, and come back from: host memory, then disk.

Blocks are stored under the whole key of what they are the cache of: namespace, group and every token of the prefix.
What host memory has no room for goes to disk in the background. What is on disk is read back into host memory in the
background too, for requests that are queued, while others compute.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple, TypeVar

from kvpass.runtime.tiers.disk_store import DiskStore
from kvpass.runtime.tiers.host_memory import BlockKey, HostMemory, StoredBlock, prefix_digests

# What waits to be written may take this share of host memory once more; beyond it the oldest is given up.
_QUEUE_SHARE = 0.25
# Bytes that are written in one transaction.
_BATCH_BYTES = 1 << 24
# What is read ahead for one request may take this share of host memory.
_READ_SHARE = 0.5
# The thread that reads and writes ends when it has had nothing to do for so long; the next need starts another.
_IDLE_SECONDS = 2.0

Found = TypeVar("Found")


@dataclass(frozen=True)
class TierCounts:
    """What went where so far, in blocks of one group.

    Attributes:
        demoted: from the device to host memory.
        promoted: from host memory to the device.
        written: from host memory to disk.
        read: from disk to host memory.
        given_up: on the way to disk, for lack of speed.
        disk_errors: times that something on disk was broken, or refused.
        host_bytes: bytes taken in host memory now.
        disk_bytes: bytes taken on disk now.
    """

    demoted: int = 0
    promoted: int = 0
    written: int = 0
    read: int = 0
    given_up: int = 0
    disk_errors: int = 0
    host_bytes: int = 0
    disk_bytes: int = 0


class Wanted(NamedTuple):
    """What is looked for of a prefix: its blocks behind the first ``start``.

    Attributes:
        namespace: whose blocks it may have.
        tokens: bytes of the tokens of the whole prefix.
        step: bytes of the tokens of a block.
        start: blocks that the device has of every group that needs them.
        present: for each window group, how many blocks up to ``start`` are there already, without a gap.
        held: of the first of the further blocks, which groups have theirs on the device.
    """

    namespace: str
    tokens: bytes
    step: int
    start: int
    present: Mapping[int, int]
    held: Sequence[Sequence[bool]] = ()


class Prefetch:
    """Blocks on their way from disk to host memory."""

    def __init__(self, keys: list[BlockKey]) -> None:
        self.keys = keys
        self._done = threading.Event()

    @property
    def is_done(self) -> bool:
        """All that could be read is in host memory."""
        return self._done.is_set()

    def wait(self, timeout: float | None = None) -> bool:
        """Wait until that is so; False if it is not after ``timeout`` seconds."""
        return self._done.wait(timeout)

    def finish(self) -> None:
        """Take note that there is nothing more to read."""
        self._done.set()


class Tiers:
    """Host memory, and behind it a disk if there is one. Any thread may call.

    ``windows`` gives for each group the newest tokens that a query may look at, as for the prefix tree.
    """

    def __init__(
        self, host_bytes: int, disk: DiskStore | None, block_size: int, windows: Sequence[int | None] = (None,)
    ) -> None:
        self._host = HostMemory(host_bytes, self._overflow)
        self._disk = disk
        self._groups = len(windows)
        self._reach = {g: -(-(window - 1) // block_size) for g, window in enumerate(windows) if window is not None}
        # Guards all that follows, and the host memory. Never held while the disk is at work.
        self._lock = threading.Condition()
        self._writes: deque[StoredBlock] = deque()
        self._write_bytes = 0
        self._reads: deque[Prefetch] = deque()
        # Dropping makes what is being read at that moment worthless.
        self._drops = 0
        self._busy = False
        self._closed = False
        self._thread: threading.Thread | None = None
        self._counts = {"demoted": 0, "promoted": 0, "written": 0, "read": 0, "given_up": 0}

    @property
    def counts(self) -> TierCounts:
        """What went where so far."""
        with self._lock:
            errors = 0 if self._disk is None else self._disk.errors
            sizes = {"host_bytes": self.host_bytes, "disk_bytes": self.disk_bytes}
            return TierCounts(**self._counts, disk_errors=errors, **sizes)

    @property
    def has_disk(self) -> bool:
        """Whether there is a disk behind host memory."""
        return self._disk is not None

    @property
    def host_bytes(self) -> int:
        """Bytes taken in host memory."""
        return self._host.size

    @property
    def disk_bytes(self) -> int:
        """Bytes taken on disk."""
        return 0 if self._disk is None else self._disk.size

    def put(self, block: StoredBlock) -> None:
        """Store the content of a block that leaves the device."""
        with self._lock:
            self._host.put(block)
            self._counts["demoted"] += 1

    def count_promoted(self, count: int) -> None:
        """Take note that so many blocks were written to the device."""
        with self._lock:
            self._counts["promoted"] += count

    def holds(self, key: BlockKey) -> bool:
        """Whether host memory has the block already; it then counts as used just now."""
        with self._lock:
            self._host.touch(key.digest)
            return self._host.get(key.digest, key.namespace, key.group, key.tokens) is not None

    def find(self, wanted: Wanted) -> list[list[StoredBlock | None]]:
        """What host memory has of a prefix.

        Returns:
            for each further block that of each group, None where the device has it or no window reaches back to it; as
            long as every group has what the next token looks at.
        """

        def look(group: int, end: int, digest: bytes) -> StoredBlock | None:
            return self._host.get(digest, wanted.namespace, group, wanted.tokens[:end])

        with self._lock:
            if not len(self._host):
                return []
            found = self._search(wanted, look)
            # Tails are to make room before their heads.
            for blocks in reversed(found):
                for block in blocks:
                    if block is not None:
                        self._host.touch(block.key.digest)
            return found

    def prefetch(self, wanted: Wanted) -> Prefetch | None:
        """Begin to read what disk has of a prefix, as :meth:`find` would find it; None if it has nothing to add."""
        disk = self._disk
        if disk is None or not len(disk):
            return None

        def look(group: int, end: int, digest: bytes) -> StoredBlock | BlockKey | None:
            stored = self._host.get(digest, wanted.namespace, group, wanted.tokens[:end])
            if stored is None and digest in disk:
                return BlockKey(wanted.namespace, group, wanted.tokens[:end], digest)
            return stored

        with self._lock:
            if self._closed:
                return None
            found = self._search(wanted, look)
            keys, size = [], 0
            for block in (block for blocks in found for block in blocks):
                if isinstance(block, BlockKey):
                    size += disk.row_size(block.digest)
                    if size > _READ_SHARE * self._host.capacity:
                        break
                    keys.append(block)
            if not keys:
                return None
            job = Prefetch(keys)
            self._reads.append(job)
            self._wake()
            return job

    def drop(self, namespace: str | None) -> None:
        """Forget all blocks of one namespace, or all there are, in every tier."""
        with self._lock:
            self._drops += 1
            self._host.drop(namespace)
            kept = [block for block in self._writes if namespace not in (None, block.key.namespace)]
            self._writes = deque(kept)
            self._write_bytes = sum(block.size for block in kept)
            self._lock.wait_for(lambda: not self._busy)
            if self._disk is not None:
                self._disk.drop(namespace)

    def change_disk(self, disk: DiskStore | None) -> None:
        """Forget all blocks in host memory, and go on with another disk; what is on the one before stays there."""
        with self._lock:
            self._drops += 1
            self._host.drop(None)
            self._writes.clear()
            self._write_bytes = 0
            self._lock.wait_for(lambda: not self._busy)
            before, self._disk = self._disk, disk
        if before is not None:
            before.close()

    def write(self, blocks: list[StoredBlock]) -> None:
        """Write blocks to disk at once."""
        if self._disk is not None:
            self._disk.put(blocks)
            with self._lock:
                self._counts["written"] += len(blocks)

    def save(self) -> None:
        """Write to disk all that is in host memory, and wait until it is there."""
        if self._disk is None:
            return
        with self._lock:
            # One after the other: the queue holds less than host memory.
            for block in list(self._host):
                self._enqueue(block)
                self._lock.wait_for(lambda: not self._writes)
        self.flush()

    def flush(self) -> None:
        """Wait until all that is on its way has arrived."""
        with self._lock:
            self._lock.wait_for(lambda: not self._busy and not self._reads and not self._writes)

    def close(self) -> None:
        """Let what is on its way to disk arrive, and close the disk's file; nothing is stored any more."""
        with self._lock:
            self._closed = True
            self._lock.notify_all()
            thread = self._thread
        if thread is not None:
            thread.join()
        with self._lock:
            self._host.overflow = None
            self._host.drop(None)
            if self._disk is not None:
                self._disk.close()

    def _search(self, wanted: Wanted, look: Callable[[int, int, bytes], Found | None]) -> list[list[Found | None]]:
        """As :meth:`find`, over whatever ``look(group, end of the tokens, digest)`` finds."""
        namespace, tokens, step, start, present, held = wanted
        digests = [prefix_digests(namespace, group, tokens, step, start) for group in range(self._groups)]
        run = {group: present[group] for group in self._reach}
        rows: list[list[Found | None]] = []
        usable = 0
        for count, row_digests in enumerate(zip(*digests, strict=True), start + 1):
            here = held[len(rows)] if len(rows) < len(held) else (False,) * self._groups
            row = [None if here[group] else look(group, count * step, d) for group, d in enumerate(row_digests)]
            there = [known or found is not None for known, found in zip(here, row, strict=True)]
            if not all(found or group in self._reach for group, found in enumerate(there)):
                break
            rows.append(row)
            for group in run:
                run[group] = run[group] + 1 if there[group] else 0
            if all(have >= min(count, self._reach[group]) for group, have in run.items()):
                usable = len(rows)
        rows = rows[:usable]
        for group, reach in self._reach.items():
            for row in rows[: max(0, len(rows) - reach)]:
                row[group] = None
        return rows

    def _overflow(self, block: StoredBlock) -> None:
        if self._disk is not None and not self._closed:
            self._enqueue(block)

    def _enqueue(self, block: StoredBlock) -> None:
        """Have a block written, unless it is on disk already."""
        if self._disk is None or self._disk.touch(block.key.digest):
            return
        self._writes.append(block)
        self._write_bytes += block.size
        while self._write_bytes > max(_QUEUE_SHARE * self._host.capacity, block.size):
            self._write_bytes -= self._writes.popleft().size
            self._counts["given_up"] += 1
        self._wake()

    def _wake(self) -> None:
        if self._thread is None:
            self._thread = threading.Thread(target=self._work, name="kvpass-tiers", daemon=True)
            self._thread.start()
        self._lock.notify_all()

    def _work(self) -> None:
        """Read and write until there is nothing to do; reads come first, somebody waits for them."""
        while True:
            with self._lock:
                self._lock.wait_for(lambda: self._reads or self._writes or self._closed, _IDLE_SECONDS)
                job = self._reads.popleft() if self._reads else None
                batch = [] if job is not None else self._take_batch()
                if job is None and not batch:
                    self._thread = None
                    return
                self._busy = True
                drops = self._drops
            try:
                if job is not None:
                    self._read(job, drops)
                elif self._disk is not None:
                    self._disk.put(batch)
                    self._counts["written"] += len(batch)
            except BaseException:
                self._thread = None
                raise
            finally:
                if job is not None:
                    job.finish()
                with self._lock:
                    self._busy = False
                    self._lock.notify_all()

    def _take_batch(self) -> list[StoredBlock]:
        batch: list[StoredBlock] = []
        size = 0
        while self._writes and size < _BATCH_BYTES:
            batch.append(self._writes.popleft())
            size += batch[-1].size
        self._write_bytes -= size
        return batch

    def _read(self, job: Prefetch, drops: int) -> None:
        for key in job.keys:
            block = None if self._disk is None or self._closed else self._disk.get(key)
            with self._lock:
                # What follows a block that is missing is of no use.
                if block is None or self._drops != drops:
                    return
                self._host.put(block)
                self._counts["read"] += 1
