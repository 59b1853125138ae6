"""``ValueLedger``: parameters and buffers whose values decided something in a rewrite, and have to stay as they are.

Most weights may change in place as they like: the rewritten graph reads them where they are. But a mask that was read,
heads that were found equal, a constant that was folded are what they were when the model was compiled.
"""

from __future__ import annotations

import zlib
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

CHUNK = 1 << 16  # numbers of 32 bits that are multiplied with one set of weights


@dataclass(frozen=True, eq=False)
class Entry:
    """One tensor whose value decided something.

    Attributes:
        name: of the tensor in the captured module.
        tensor: the tensor.
        decided: what it decided, such as "the mask of layers.0".
        digest: of its content when it was read.
    """

    name: str
    tensor: Tensor
    decided: str
    digest: int


@dataclass
class ValueLedger:
    """Tensors by their names in the captured module.

    Attributes:
        tensors: all that the model was captured with; others are the rewrite's own, and not recorded. Empty where
            that is not known: then all are recorded.
        entries: those whose values decided something.
        joined: those that the rewritten graph reads as parts of a larger one, in which they have to stay.
    """

    tensors: dict[str, Tensor] = field(default_factory=dict)
    entries: dict[str, Entry] = field(default_factory=dict)
    joined: dict[str, Tensor] = field(default_factory=dict)

    def record(self, name: str, tensor: Tensor, decided: str) -> None:
        """Note that the value that a tensor has now decides something; what it decided first is kept."""
        if name not in self.entries and (not self.tensors or name in self.tensors):
            self.entries[name] = Entry(name, tensor, decided, digests([tensor])[0])

    def join(self, name: str, tensor: Tensor) -> None:
        """Note that a tensor has become a view of a larger one that is read in its place."""
        if not self.tensors or name in self.tensors:
            self.joined[name] = tensor

    def copy(self) -> ValueLedger:
        """A ledger of its own with the same entries."""
        return ValueLedger(self.tensors, dict(self.entries), dict(self.joined))


@torch.no_grad()
def digests(tensors: Sequence[Tensor]) -> list[int]:
    """A number for the bytes of each tensor: equal for equal bytes, and for others one time in four billion.

    A device is waited for once, however many tensors it has.
    """
    found: list[int | None] = []
    waiting: dict[torch.device, list[tuple[int, Tensor]]] = {}
    for place, tensor in enumerate(tensors):
        content = _bytes_of(tensor)
        if content.device.type == "cpu":
            found.append(zlib.crc32(content.numpy().data))
        else:
            found.append(None)
            waiting.setdefault(content.device, []).append((place, sum_on_device(content)))
    for sums in waiting.values():
        for (place, _), value in zip(sums, torch.stack([total for _, total in sums]).tolist(), strict=True):
            found[place] = value
    return [value for value in found if value is not None]


def _bytes_of(tensor: Tensor) -> Tensor:
    """The content, uint8 ``[n]``."""
    plain = tensor.detach()
    plain = plain if plain.layout is torch.strided else plain.to_dense()
    flat = plain.resolve_conj().resolve_neg().contiguous().reshape(-1)
    if flat.is_complex():
        flat = torch.view_as_real(flat).reshape(-1)
    if flat.numel() == 1:  # which is contiguous whatever its stride says
        flat = flat.clone(memory_format=torch.contiguous_format)
    return flat.view(torch.uint8)


def sum_on_device(content: Tensor) -> Tensor:
    """Digest of uint8 ``[n]``, int64 ``[]``: a sum of its 32-bit numbers with random weights, modulo 2**64.

    Two contents have one digest for one choice of the weights in 2**32 (multilinear hashing).
    """
    padding = -len(content) % (4 * CHUNK)
    numbers = torch.nn.functional.pad(content, (0, padding)).view(torch.int32).view(-1, CHUNK)
    generator = torch.Generator().manual_seed(len(content))
    low, high = -(2**63), 2**63 - 1
    within, across = (
        torch.randint(low, high, (size,), generator=generator).to(content.device) for size in (CHUNK, len(numbers))
    )
    sums = torch.stack([(row.long() * within).sum() for row in numbers]) if len(numbers) else across
    return (sums * (across | 1)).sum()
