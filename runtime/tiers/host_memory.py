"""The first tier behind the device: content of evicted blocks in host memory, under the whole key of what it is."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from hashlib import blake2b

import numpy as np
from numpy.typing import NDArray

Payload = NDArray[np.uint8]

TOKEN_BYTES = np.dtype(np.int32).itemsize  # of a token id in a key; the prefix tree compares these bytes
DIGEST_BYTES = 32
# What an entry takes beside its tokens and its payload, about.
_ENTRY_BYTES = 512


def prefix_digests(namespace: str, group: int, tokens: bytes, step: int, start: int) -> Iterator[bytes]:
    """The digest of each prefix of ``start + 1``, ``start + 2``, ... blocks of ``step`` bytes of tokens.

    It says where to look and never what is equal: whoever finds something compares the tokens.
    """
    head = namespace.encode()
    digest = blake2b(len(head).to_bytes(8, "little") + head, digest_size=DIGEST_BYTES, salt=group.to_bytes(4, "little"))
    digest.update(tokens[: start * step])
    for begin in range(start * step, len(tokens) - step + 1, step):
        digest.update(tokens[begin : begin + step])
        yield digest.copy().digest()


@dataclass(frozen=True, slots=True)
class BlockKey:
    """What a stored block is the cache of.

    Attributes:
        namespace: what no block is shared across.
        group: the group of caches.
        tokens: bytes of all token ids of the prefix, those of the block last.
        digest: of the other three.
    """

    namespace: str
    group: int
    tokens: bytes = field(repr=False)
    digest: bytes = field(repr=False, compare=False)

    @staticmethod
    def of(namespace: str, group: int, tokens: bytes) -> BlockKey:
        """The key of the last block of ``tokens``."""
        (digest,) = prefix_digests(namespace, group, tokens, len(tokens), 0)
        return BlockKey(namespace, group, tokens, digest)


@dataclass(frozen=True, eq=False, slots=True)
class StoredBlock:
    """The content of one block in all caches of its group.

    Attributes:
        key: what it is the cache of.
        payload: uint8 ``[bytes]``.
    """

    key: BlockKey
    payload: Payload = field(repr=False)

    @property
    def size(self) -> int:
        """Bytes that it takes in host memory, about."""
        return len(self.key.tokens) + self.payload.nbytes + _ENTRY_BYTES


class HostMemory:
    """Blocks in at most ``capacity`` bytes; what was stored or touched longest ago makes room.

    Attributes:
        capacity: most bytes.
        size: bytes that are taken.
        overflow: called with each block that has to make room.
    """

    def __init__(self, capacity: int, overflow: Callable[[StoredBlock], None] | None = None) -> None:
        self.capacity = capacity
        self.size = 0
        self.overflow = overflow
        self._blocks: OrderedDict[bytes, StoredBlock] = OrderedDict()

    def __len__(self) -> int:
        return len(self._blocks)

    def __iter__(self) -> Iterator[StoredBlock]:
        """The blocks, in the order in which they make room."""
        return iter(self._blocks.values())

    def put(self, block: StoredBlock) -> None:
        """Store a block, in place of what stands under its digest."""
        self.remove(block.key.digest)
        self._blocks[block.key.digest] = block
        self.size += block.size
        while self.size > self.capacity:
            _, oldest = self._blocks.popitem(last=False)
            self.size -= oldest.size
            if self.overflow is not None:
                self.overflow(oldest)

    def get(self, digest: bytes, namespace: str, group: int, tokens: bytes) -> StoredBlock | None:
        """The block of exactly this key, if it is here."""
        block = self._blocks.get(digest)
        if block is None or (block.key.namespace, block.key.group, block.key.tokens) != (namespace, group, tokens):
            return None
        return block

    def touch(self, digest: bytes) -> None:
        """What stands under ``digest`` was used just now."""
        if digest in self._blocks:
            self._blocks.move_to_end(digest)

    def remove(self, digest: bytes) -> None:
        """Forget what stands under ``digest``."""
        block = self._blocks.pop(digest, None)
        if block is not None:
            self.size -= block.size

    def drop(self, namespace: str | None) -> None:
        """Forget the blocks of one namespace; all of them if it is None."""
        for digest in [d for d, block in self._blocks.items() if namespace in (None, block.key.namespace)]:
            self.remove(digest)
