"""Runs the folder with ONNX Runtime GenAI, which keeps the caches itself; one generator for each sequence."""

from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime_genai


class Decoder:
    """Sequences of one model; a sequence is its generator and its tokens."""

    def __init__(self, folder: Path) -> None:
        self.model = onnxruntime_genai.Model(str(folder))

    def start(self, other: Any = None, tokens: int = 0) -> Any:
        """A new sequence; it begins with so many tokens of another, which are read again."""
        generator = onnxruntime_genai.Generator(self.model, onnxruntime_genai.GeneratorParams(self.model))
        sequence = {"generator": generator, "tokens": []}
        if other and tokens:
            self.step([sequence], [other["tokens"][:tokens]])
        return sequence

    def end(self, sequence: Any) -> None:
        """Give a sequence's caches back."""
        sequence["generator"] = None

    def step(self, sequences: list[Any], tokens: list[list[int]]) -> Any:
        """Logits ``[N, vocabulary]`` after the new tokens of each sequence, of any numbers."""
        rows = []
        for sequence, new in zip(sequences, tokens, strict=True):
            sequence["generator"].append_tokens(np.array([new], np.int32))
            sequence["tokens"] += new
            rows.append(sequence["generator"].get_logits()[0, -1])
        return np.stack(rows)
