"""Sequences over a pool of blocks: prefill, decode, ragged batches, and prefixes that sequences share."""

from pathlib import Path
from typing import Any

import numpy as np

from kvpass.exporters.drivers.onnx_program import Program


class Decoder:
    """Owns the blocks; a sequence is its length and its blocks."""

    def __init__(self, folder: Path, blocks: int = 256) -> None:
        self.program = Program(folder, blocks=blocks)
        cache = self.program.manifest["cache"]
        self.size, self.groups = cache["block_size"], cache["groups"]
        self.says_widest = any(port["name"] == "columns" for port in self.program.manifest["inputs"])
        self.users, self.free = [0] * blocks, list(range(blocks))

    def start(self, other: Any = None, tokens: int = 0) -> Any:
        """A new sequence; it begins with so many tokens of another, of which whole blocks are shared."""
        shared = other["blocks"][: tokens // self.size] if other else []
        for block in shared:
            self.users[block] += 1
        return {"length": len(shared) * self.size, "blocks": list(shared)}

    def end(self, sequence: Any) -> None:
        """Give a sequence's blocks back."""
        for block in sequence["blocks"]:
            self.users[block] -= 1
            if not self.users[block]:
                self.free.append(block)

    def step(self, sequences: list[Any], tokens: list[list[int]]) -> Any:
        """Logits ``[N, vocabulary]`` after the new tokens of each sequence, of any numbers."""
        for sequence, new in zip(sequences, tokens, strict=True):
            sequence["length"] += len(new)
            while len(sequence["blocks"]) * self.size < sequence["length"]:
                sequence["blocks"].append(self.free.pop())
                self.users[sequence["blocks"][-1]] = 1
        tables = np.zeros((self.groups, len(sequences), max(len(s["blocks"]) for s in sequences)), np.int64)
        for row, sequence in enumerate(sequences):
            tables[:, row, : len(sequence["blocks"])] = sequence["blocks"]
        counts = np.array([len(new) for new in tokens], np.int64)
        more = {"columns": np.arange(counts.max())} if self.says_widest else {}
        return self.program.run(
            token_ids=np.concatenate(tokens).astype(np.int64),
            new_lens=counts,
            seq_lens=np.array([sequence["length"] for sequence in sequences], np.int64),
            block_tables=tables,
            logits_index=np.cumsum(counts) - 1,
            **more,
        )
