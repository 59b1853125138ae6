"""Is anything wrong ever read from the disk tier after its process was killed in the middle of writing?

A child process writes blocks as fast as it can, whose content follows from their keys; it is killed (SIGKILL) after a
random time, and another one goes on with the same file. After each kill this process opens the store and reads every
key that there could be: a block that comes back with other content is a wrong read. After some of the kills the file
is cut short as well, or has bytes changed.

    python benchmarks/disk_crash.py
"""

from __future__ import annotations

import argparse
import multiprocessing
import random
import tempfile
import time
from multiprocessing.synchronize import Event
from pathlib import Path

import numpy as np

from kvpass.cli.terminal import output
from kvpass.quality.measure import write_result
from kvpass.runtime.tiers.disk_store import FILE_NAME, DiskStore
from kvpass.runtime.tiers.host_memory import BlockKey, StoredBlock

KEYS = 400
BLOCK_BYTES = 64 * 1024
# Less than all keys take, so that rows are deleted all the time as well.
CAPACITY = 16 * 1024 * 1024
BATCH = 8


def make_block(number: int) -> StoredBlock:
    """The block of a number; tokens and content follow from it."""
    draw = np.random.default_rng(number)
    tokens = draw.integers(0, 50_000, size=16 * (1 + number % 7), dtype=np.int32).tobytes()
    content = draw.integers(0, 256, size=BLOCK_BYTES, dtype=np.uint8)
    return StoredBlock(BlockKey.of(f"tenant {number % 3}", number % 2, tokens), content)


def write_for_ever(folder: str, blocks: list[StoredBlock], seed: int, ready: Event) -> None:
    store = DiskStore(folder, CAPACITY)
    draw = random.Random(seed)
    ready.set()
    while True:
        store.put(draw.sample(blocks, BATCH))
        if draw.random() < 0.02:
            store.drop(f"tenant {draw.randrange(3)}")


def damage(path: Path, draw: random.Random) -> None:
    """Cut the file short, or change some of its bytes."""
    size = path.stat().st_size
    if draw.random() < 0.5:
        with path.open("r+b") as file:
            file.truncate(draw.randrange(size))
    else:
        with path.open("r+b") as file:
            for _ in range(20):
                file.seek(draw.randrange(size))
                file.write(bytes([draw.randrange(256)]))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=200, help="how often the writer is killed (default 200)")
    parser.add_argument("--seed", type=int, default=0, help="seed of the times and of the damage (default 0)")
    parser.add_argument("--results", type=Path, default=Path(__file__).parent / "results", help="folder for the JSON")
    options = parser.parse_args()
    # A fork starts at once, and no file is open in this process at that time.
    context = multiprocessing.get_context("fork")
    draw = random.Random(options.seed)
    blocks = [make_block(number) for number in range(KEYS)]
    good = wrong = damaged = begun_anew = 0
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / FILE_NAME
        for kill in range(options.kills):
            ready = context.Event()
            arguments = (folder, blocks, options.seed + kill, ready)
            writer = context.Process(target=write_for_ever, args=arguments, daemon=True)
            writer.start()
            ready.wait()
            time.sleep(draw.uniform(0.0, 0.2))
            writer.kill()
            writer.join()
            if kill % 10 == 9:
                log = Path(f"{path}-wal")
                damage(log if log.exists() and log.stat().st_size and draw.random() < 0.5 else path, draw)
                damaged += 1
            store = DiskStore(folder, CAPACITY)
            for block in blocks:
                found = store.get(block.key)
                if found is not None:
                    good += np.array_equal(found.payload, block.payload)
                    wrong += not np.array_equal(found.payload, block.payload)
            begun_anew += path.with_name(f"{FILE_NAME}.broken").exists()
            path.with_name(f"{FILE_NAME}.broken").unlink(missing_ok=True)
            store.close()
    output().print(
        f"{options.kills} kills, {damaged} of them with the file damaged as well ({begun_anew} times the store began "
        f"anew): {good} blocks read, {wrong} of them wrong"
    )
    row = {"kills": options.kills, "damaged": damaged, "begun_anew": begun_anew, "read": good, "wrong": wrong}
    output().print(f"written to {write_result(options.results, 'disk_crash', {'seed': options.seed}, [row])}")
    if wrong:
        raise SystemExit(1)


if __name__ == "__main__":
    main()
