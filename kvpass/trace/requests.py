"""Request traces in JSON lines: when requests came, what their prompts were, how much was generated.

A line has ``arrival`` (seconds) or ``timestamp`` (milliseconds), ``output_length``, and the prompt: as token ids,
``prompt``, or as the published Mooncake traces have it, ``input_length`` and ``hash_ids``, one for each block of 512
tokens (Qin et al., Mooncake, arXiv 2407.00079). Equal hashes become equal tokens, so that such prompts share.
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from kvpass.errors import InputError
from kvpass.runtime.sampling.random_numbers import uniform_numbers

HASHED_TOKENS = 512  # of a block of the Mooncake traces
FORM = (
    "a line is a JSON object with arrival (seconds) or timestamp (milliseconds), output_length, and prompt (token ids) "
    "or input_length and hash_ids"
)


@dataclass(frozen=True)
class TraceRequest:
    """One line of a trace.

    Attributes:
        arrival: seconds from the beginning of the trace.
        input_length: tokens of the prompt.
        output_length: tokens that were generated.
        prompt: the token ids; None where only hashes are known.
        hash_ids: what stands for the blocks of the prompt.
        hashed_tokens: tokens of such a block.
    """

    arrival: float
    input_length: int
    output_length: int
    prompt: tuple[int, ...] | None = None
    hash_ids: tuple[int, ...] = ()
    hashed_tokens: int = HASHED_TOKENS

    def tokens(self, vocab_size: int) -> NDArray[np.int64]:
        """Token ids of the prompt, ``[input_length]``: its own, or such that equal hashes give equal ones.

        Raises:
            InputError: if the prompt has ids beyond the vocabulary.
        """
        if self.prompt is not None:
            if max(self.prompt) >= vocab_size or min(self.prompt) < 0:
                raise InputError(f"a prompt of the trace has ids beyond those of the model, 0 to {vocab_size - 1}")
            return np.array(self.prompt, dtype=np.int64)
        blocks = [block_tokens(hash_id, self.hashed_tokens, vocab_size) for hash_id in self.hash_ids]
        return np.concatenate(blocks)[: self.input_length]


def block_tokens(hash_id: int, count: int, vocab_size: int) -> NDArray[np.int64]:
    """Token ids ``[count]`` that stand for a hash: always the same, and unlike those of any other hash."""
    return (uniform_numbers([hash_id] * count, range(count)) * vocab_size).astype(np.int64)


def read_trace(path: Path, limit: int | None = None, hashed_tokens: int = HASHED_TOKENS) -> list[TraceRequest]:
    """The first ``limit`` requests of a trace, in the order of arrival; the first one arrives at 0.

    Raises:
        InputError: if the file cannot be read, or a line is no request.
    """
    requests: list[TraceRequest] = []
    try:
        with path.open(encoding="utf-8") as lines:
            for number, line in enumerate(lines, 1):
                if limit is not None and len(requests) >= limit:
                    break
                if line.strip():
                    requests.append(_parse(line, f"{path}, line {number}", hashed_tokens))
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"the trace {path} cannot be read: {error}") from error
    if not requests:
        raise InputError(f"the trace {path} holds no request: {FORM}")
    first = min(request.arrival for request in requests)
    shifted = [replace(request, arrival=request.arrival - first) for request in requests]
    return sorted(shifted, key=lambda request: request.arrival)


def _parse(line: str, where: str, hashed_tokens: int) -> TraceRequest:
    try:
        row = json.loads(line)
    except ValueError as error:
        raise InputError(f"{where}: this is no JSON ({error}): {FORM}") from error
    if not isinstance(row, dict):
        raise InputError(f"{where}: this is no JSON object: {FORM}")
    arrival = _number(row, "arrival", where) if "arrival" in row else _number(row, "timestamp", where) / 1000
    output = _count(row, "output_length", where)
    if "prompt" in row:
        prompt = _ids(row, "prompt", where)
        return TraceRequest(arrival, len(prompt), output, prompt)
    length, hashes = _count(row, "input_length", where), _ids(row, "hash_ids", where)
    if len(hashes) * hashed_tokens < length:
        raise InputError(
            f"{where}: {len(hashes)} hash_ids of {hashed_tokens} tokens do not cover an input_length of {length}"
        )
    return TraceRequest(arrival, length, output, None, hashes[: -(-length // hashed_tokens)], hashed_tokens)


def _number(row: dict[str, Any], name: str, where: str) -> float:
    value = row.get(name)
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise InputError(f"{where}: {name}={value!r} is no number: {FORM}")
    return float(value)


def _count(row: dict[str, Any], name: str, where: str) -> int:
    value = row.get(name)
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise InputError(f"{where}: {name}={value!r} is not a whole number of at least 1: {FORM}")
    return value


def _ids(row: dict[str, Any], name: str, where: str) -> tuple[int, ...]:
    value = row.get(name)
    if not isinstance(value, list) or not value or not all(type(item) is int for item in value):
        raise InputError(f"{where}: {name} is no list of whole numbers: {FORM}")
    return tuple(value)
