"""Sequences over the rows of a static cache: prefill, decode, ragged batches, and rows that begin as others do."""

from pathlib import Path
from typing import Any

import numpy as np

from kvpass.exporters.drivers.onnx_program import Program


class Decoder:
    """Owns the rows; a sequence is its length and its row."""

    def __init__(self, folder: Path, batch: int = 4) -> None:
        self.program = Program(folder, batch=batch)
        self.context = self.program.manifest["cache"]["context"]
        self.lengths, self.free = np.zeros(batch, np.int64), list(range(batch))

    def start(self, other: Any = None, tokens: int = 0) -> Any:
        """A new sequence; it begins with so many tokens of another, which are copied."""
        sequence = {"row": self.free.pop(), "length": tokens if other else 0}
        if other:
            self.program.copy_row(other["row"], sequence["row"])
        self.lengths[sequence["row"]] = sequence["length"]
        return sequence

    def end(self, sequence: Any) -> None:
        """Give a sequence's row back."""
        self.lengths[sequence["row"]] = 0
        self.free.append(sequence["row"])

    def step(self, sequences: list[Any], tokens: list[list[int]]) -> Any:
        """Logits ``[N, vocabulary]`` after the new tokens of each sequence, of any numbers."""
        width = max(len(new) for new in tokens)
        if self.lengths.max() + width > self.context:  # padding is written as well, and written over later
            raise ValueError(f"{width} new tokens do not fit a context of {self.context}")
        ids, counts = np.zeros((len(self.lengths), width), np.int64), np.ones(len(self.lengths), np.int64)
        for sequence, new in zip(sequences, tokens, strict=True):
            ids[sequence["row"], : len(new)], counts[sequence["row"]] = new, len(new)
        logits = self.program.run(token_ids=ids, past_lens=self.lengths, new_lens=counts)
        for sequence, new in zip(sequences, tokens, strict=True):
            sequence["length"] += len(new)
            self.lengths[sequence["row"]] = sequence["length"]
        return logits[[sequence["row"] for sequence in sequences]]
