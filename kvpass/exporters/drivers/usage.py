"""What the example does when it is run."""

import sys
from pathlib import Path

import numpy as np

from kvpass.exporters.drivers.paged_decoder import Decoder


def generate(decoder: Decoder, prompts: list[list[int]], new_tokens: int) -> list[list[int]]:
    """Continue prompts of any lengths together, always with the likeliest token."""
    sequences = [decoder.start() for _ in prompts]
    tokens, outputs = prompts, [[] for _ in prompts]  # type: list[list[int]], list[list[int]]
    for _ in range(new_tokens):
        logits = decoder.step(sequences, tokens)
        if np.isnan(logits).any():
            raise ValueError("this step is none that the file is proven for: see limits in manifest.json")
        tokens = [[int(row.argmax())] for row in logits]
        for output, new in zip(outputs, tokens, strict=True):
            output += new
    for sequence in sequences:
        decoder.end(sequence)
    return outputs


if __name__ == "__main__":
    given = [[int(token) for token in text.split(",")] for text in sys.argv[1:]] or [[1, 2, 3], [4, 5]]
    for output in generate(Decoder(Path(__file__).parent), given, new_tokens=16):
        print(*output, sep=",")
