"""Known sequences read through a paged module: every logit is computed from what the cache holds, not from the text."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from kvpass.engine.engine import Engine
from kvpass.kernels.formats.settling import SettlingTables
from kvpass.runtime.pool.capacity import allocate_caches
from kvpass.types import StepInputs


@dataclass(frozen=True)
class Samples:
    """Sequences of equal length, and which of their tokens count.

    Attributes:
        name: for tables.
        input_ids: int64 ``[N, S]``.
        scored: bool ``[N, S]``; a scored token is to be predicted from those before it. Column 0 is False.
    """

    name: str
    input_ids: Tensor
    scored: Tensor

    @property
    def tokens(self) -> int:
        """Number of scored tokens."""
        return int(self.scored.sum())

    def split(self, rows: int) -> Iterator[Samples]:
        """The same in parts of at most ``rows`` sequences."""
        for ids, scored in zip(self.input_ids.split(rows), self.scored.split(rows), strict=True):
            yield Samples(self.name, ids, scored)


class Replay:
    """The module of one engine with other caches, and N sequences in them that grow by the same chunk at a time."""

    def __init__(self, engine: Engine, sequences: int, length: int) -> None:
        self.module, self.block_size = engine.module, engine.plan.block_size
        blocks, groups = -(-length // self.block_size), len(engine.plan.group_windows)
        # Neighbours in the pool belong to different sequences, as they do in an engine.
        numbers = torch.arange(groups * blocks * sequences).view(groups, blocks, sequences)
        self.tables = numbers.transpose(1, 2).contiguous().to(self.module.device)
        self.caches = allocate_caches(engine.plan, numbers.numel(), self.module.device, numbers.numel())
        self.blocks = SettlingTables(engine.plan.caches, self.caches, numbers.numel(), self.block_size)

    def step(self, tokens: Tensor, start: int, wanted: Tensor) -> Tensor:
        """Read the next chunk of every sequence.

        Args:
            tokens: int64 ``[N, C]``, at positions ``start`` and on; those before have been read.
            start: tokens that each sequence has in the cache already.
            wanted: bool ``[N, C]``, tokens behind which logits are wanted.

        Returns:
            logits ``[R, V]`` of the wanted tokens, sequence by sequence; R = 0 where none are.
        """
        count, chunk = tokens.shape
        device = self.module.device
        positions = torch.arange(start, start + chunk, device=device)
        rows = wanted.flatten().nonzero().flatten().to(device)
        last = torch.tensor([count * chunk - 1], device=device)  # a step has to ask for something
        sequences = torch.arange(count, device=device).repeat_interleave(chunk)
        with torch.inference_mode():
            self.blocks.settle(self.tables, torch.full((count,), start))
            slots, tables = self.blocks.inputs(self.tables, positions.repeat(count), sequences)
            logits: Tensor = self.module(
                StepInputs(
                    token_ids=tokens.flatten().to(device),
                    positions=positions.repeat(count),
                    slot_mapping=slots,
                    block_tables=tables,
                    seq_lens=torch.full((count,), start + chunk, device=device),
                    query_start=torch.arange(0, count * chunk + 1, chunk, device=device),
                    logits_index=rows if len(rows) else last,
                ),
                self.caches,
            )
        return logits[: len(rows)]


def replay(engines: Sequence[Engine], samples: Samples, chunk: int) -> Iterator[tuple[Tensor, list[Tensor]]]:
    """Read samples through the modules of several engines in step, ``chunk`` tokens at a time.

    Args:
        engines: engines of one model; their own caches are left alone.
        samples: what is read, all sequences at once.
        chunk: tokens of a sequence in one step; 1 is decoding. All earlier tokens are read from the cache.

    Yields:
        scored tokens int64 ``[R]``, and of each engine the logits ``[R, V]`` that predict them, R at least 1.
    """
    count, length = samples.input_ids.shape
    readers = [Replay(engine, count, length) for engine in engines]
    for start in range(0, length - 1, chunk):
        end = min(start + chunk, length - 1)  # behind the last token nothing is known to score
        wanted = samples.scored[:, start + 1 : end + 1]
        logits = [reader.step(samples.input_ids[:, start:end], start, wanted) for reader in readers]
        if wanted.any():
            yield samples.input_ids[:, start + 1 : end + 1][wanted], logits
