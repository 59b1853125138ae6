"""Random calls of the ops, and what they must give: numpy in float64, from the formats' definition, with loops."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

FORMATS = ("float32", "bfloat16", "float16", "fp8_e4m3", "fp8_e5m2", "int8", "int4")
FLOATS = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
FP8 = {"fp8_e4m3": (torch.float8_e4m3fn, 448.0), "fp8_e5m2": (torch.float8_e5m2, 57344.0)}
HEADS = ((1, 1), (2, 1), (4, 2), (6, 2), (5, 5), (7, 1), (16, 1), (20, 1), (8, 8))
DIMS = (16, 24, 32, 40, 64, 72, 80, 96, 112, 128, 160, 192, 256, 288, 320, 576)
BEYOND = 10**9  # a block id that nobody may follow


def encode(rows: np.ndarray, name: str) -> tuple[np.ndarray, np.ndarray | None]:
    """Rows ``[..., D]`` as stored bytes ``[..., bytes]``, and those of their tails ``[..., 4]``."""
    if name in FLOATS:
        return torch.from_numpy(rows).to(FLOATS[name]).view(torch.uint8).numpy(), None
    if name in FP8:
        dtype, most = FP8[name]
        finite = np.where(np.isfinite(rows), np.clip(rows, -most, most), np.float32(np.nan))
        return torch.from_numpy(finite).to(dtype).view(torch.uint8).numpy(), None
    if name == "int4":
        codes, tail = fit_codes(rows)
        low, high = np.split((codes + 8).astype(np.uint8), 2, -1)
        return low | (high << 4), tail
    levels = np.float32(127)
    largest = np.abs(rows).max(-1)
    good = np.isfinite(rows).all(-1)
    scale = np.where(good, largest / levels, np.float32(np.nan)).astype(np.float32)
    divisor = np.where(scale > 0, scale, np.float32(1))[..., None]
    codes = np.where((scale > 0)[..., None], np.rint(np.clip(rows / divisor, -levels, levels)), 0).astype(np.int8)
    return codes.view(np.uint8), scale[..., None].view(np.uint8)


def fit_codes(rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Codes of -8..7 of rows ``[..., D]``, and scale and offset in bfloat16, as bytes ``[..., 4]``.

    Of all ways to cut 0, 4, 8 or 12 percent of the range off at either end, each with its regression, the best.
    """
    good = np.isfinite(rows).all(-1)
    fine = np.where(good[..., None], rows, 0).astype(np.float64)
    low, high = fine.min(-1, keepdims=True), fine.max(-1, keepdims=True)
    span = np.where(high > low, high - low, 1.0)
    found = []
    for lower in (0.0, 0.04, 0.08, 0.12):
        for upper in (0.0, 0.04, 0.08, 0.12):
            part = (fine - low) / span
            codes = np.clip(np.rint((part - lower) / (1 - lower - upper) * 15 - 8), -8, 7)
            centred = codes - codes.mean(-1, keepdims=True)
            scale = (fine * centred).sum(-1, keepdims=True) / np.maximum((centred**2).sum(-1, keepdims=True), 1e-30)
            found.append((codes, scale, ((fine - fine.mean(-1, keepdims=True) - scale * centred) ** 2).sum(-1)))
    best = np.argmin([error for _, _, error in found], 0)[..., None]
    codes, scale = (np.take_along_axis(np.stack(each), best[None], 0)[0] for each in list(zip(*found, strict=True))[:2])
    scale = torch.from_numpy(scale).to(torch.bfloat16)
    offset = torch.from_numpy(fine.mean(-1, keepdims=True) - scale.double().numpy() * codes.mean(-1, keepdims=True))
    tail = torch.cat((scale, offset.to(torch.bfloat16)), -1).masked_fill(torch.from_numpy(~good)[..., None], torch.nan)
    return np.where(good[..., None], codes, 0), tail.view(torch.uint8).numpy()


def decode(stored: np.ndarray, scale: np.ndarray | None, name: str) -> np.ndarray:
    """The numbers that stored rows stand for, float64 ``[..., D]``."""
    if name in FLOATS or name in FP8:
        dtype = FLOATS[name] if name in FLOATS else FP8[name][0]
        return torch.from_numpy(np.ascontiguousarray(stored)).view(dtype).double().numpy()
    assert scale is not None
    if name == "int4":
        codes = np.concatenate((stored & 15, stored >> 4), -1).astype(np.float64) - 8
        parts = torch.from_numpy(scale).view(torch.bfloat16).double().numpy()
        return codes * parts[..., :1] + parts[..., 1:]
    codes = stored.view(np.int8).astype(np.float64)
    return codes * scale.view(np.float32).astype(np.float64)


def stored_row(name: str, dim: int) -> int:
    """Bytes of the elements of a row."""
    return dim // 2 if name == "int4" else dim * {"float32": 4, "bfloat16": 2, "float16": 2}.get(name, 1)


class Cache:
    """A cache tensor full of NaN, into which rows are written by the definition of its format."""

    def __init__(self, name: str, blocks: int, heads: int, size: int, dim: int) -> None:
        self.name, self.size, self.dim = name, size, dim
        row = stored_row(name, dim)
        self.scaled = name in ("int8", "int4")
        self.bytes = np.full((blocks, heads, size * (row + 4 * self.scaled)), 0xFF, np.uint8)
        self.elements = self.bytes[:, :, : size * row].reshape(blocks, heads, size, row)
        self.elements = np.lib.stride_tricks.as_strided(
            self.bytes, (blocks, heads, size, row), (*self.bytes.strides[:2], row, 1)
        )
        self.scales = np.lib.stride_tricks.as_strided(
            self.bytes[:, :, size * row :], (blocks, heads, size, 4), (*self.bytes.strides[:2], 4, 1)
        )

    def write(self, block: np.ndarray, offset: np.ndarray, rows: np.ndarray) -> None:
        """Rows ``[K, H, D]`` float32 to places ``[K]``."""
        stored, scale = encode(rows, self.name)
        self.elements[block, :, offset] = stored
        if scale is not None:
            self.scales[block, :, offset] = scale

    def read(self, block: np.ndarray, offset: np.ndarray) -> np.ndarray:
        """Numbers ``[K, H, D]``, float64."""
        scale = None
        if self.scaled:
            scale = np.ascontiguousarray(self.scales[block, :, offset])
        return decode(np.ascontiguousarray(self.elements[block, :, offset]), scale, self.name)

    def as_good(self, block: np.ndarray, offset: np.ndarray, rows: np.ndarray, got: Tensor) -> Tensor:
        """The bytes of a tensor's int4 rows that hold ``rows`` as well as this cache does, bool in one dim.

        Which of two trials wins that are all but equal is a matter of rounding, and so is to which of two bfloat16
        numbers an offset goes that lies halfway: half a step of it may be a few hundredths of the error.
        """
        other, mark = (Cache(self.name, *got.shape[:3], self.dim) for _ in range(2))
        other.bytes[...], mark.bytes[...] = got.numpy().reshape(other.bytes.shape), 0
        errors = [((each.read(block, offset) - rows) ** 2).sum(-1) for each in (other, self)]
        good = (errors[0] <= errors[1] * 1.05 + 1e-30) | (np.isnan(errors[0]) & np.isnan(errors[1]))
        for part in (mark.elements, mark.scales):
            part[block, :, offset] = good[..., None]
        return torch.from_numpy(mark.bytes.astype(bool)).view(-1)

    def tensor(self) -> Tensor:
        """A copy, as the ops take it."""
        blocks, heads, _ = self.bytes.shape
        flat = torch.from_numpy(self.bytes.copy())
        if self.scaled:
            return flat.view(blocks, heads, self.size, -1)
        dtype = FLOATS[self.name] if self.name in FLOATS else FP8[self.name][0]
        return flat.view(dtype).view(blocks, heads, self.size, self.dim)


@dataclass
class Step:
    """Sequences of one step over two caches; table entries that may not be followed lead far out of them."""

    keys: Cache
    values: Cache
    tables: np.ndarray
    lengths: list[int]
    counts: list[int]

    @property
    def starts(self) -> np.ndarray:
        return np.concatenate(([0], np.cumsum(self.counts))).astype(np.int64)

    def arguments(self) -> tuple[Tensor, Tensor, Tensor]:
        return torch.from_numpy(self.tables), torch.tensor(self.lengths), torch.from_numpy(self.starts)

    def rows(self, cache: Cache, n: int, shown: np.ndarray) -> np.ndarray:
        """Numbers ``[K, H, D]`` of tokens of sequence n."""
        return cache.read(self.tables[n, shown // cache.size], shown % cache.size)


def make_step(
    random: np.random.Generator, formats: tuple[str, str], heads: int, dims: tuple[int, int], size: int,
    lengths: list[int], counts: list[int], shared: list[tuple[int, int, int]] = (),
) -> Step:  # fmt: skip
    """``shared``: (first sequence, sequences, tokens) that have the same first blocks."""
    width = max(-(-length // size) for length in lengths) + int(random.integers(0, 2))
    tables = np.full((len(lengths), max(1, width)), BEYOND, np.int64)
    needed = sum(-(-length // size) for length in lengths)
    order = list(random.permutation(needed + 3))
    keys, values = (Cache(name, needed + 3, heads, size, dim) for name, dim in zip(formats, dims, strict=True))
    for n, length in enumerate(lengths):
        blocks = -(-length // size)
        tables[n, :blocks] = [order.pop() for _ in range(blocks)]
    for first, members, tokens in shared:
        tables[first : first + members, : tokens // size] = tables[first, : tokens // size]
    for n, length in enumerate(lengths):
        k = np.arange(length)
        spread = np.exp(random.normal(size=(length, heads, 1)) * 0.5)
        for cache in (keys, values):
            rows = (random.normal(size=(length, heads, cache.dim)) * spread).astype(np.float32)
            cache.write(tables[n, k // size], k % size, rows)
    return Step(keys, values, tables, lengths, counts)


def attend(
    step: Step, query: Tensor, scale: float, value_dim: int | None = None, softcap: float | None = None,
    window: int | None = None, slopes: Any = None, sinks: Any = None, bias: Any = None, chunk: int | None = None,
    tree_mask: Any = None,
) -> tuple[np.ndarray, np.ndarray, np.ndarray, float]:  # fmt: skip
    """Output, log-sum-exp, mass, and the largest magnitude of a value; ``value_dim``: values are part of the keys."""
    q_all = query.double().numpy()
    tokens, q_heads, _ = q_all.shape
    kv_heads = step.keys.bytes.shape[1]
    width = step.values.dim if value_dim is None else value_dim
    out = np.zeros((tokens, q_heads, width))
    lse = np.full((tokens, q_heads), -np.inf)
    mass = np.zeros((len(step.lengths), kv_heads, step.tables.shape[1] * step.keys.size))
    largest = 0.0
    for n, (length, count) in enumerate(zip(step.lengths, step.counts, strict=True)):
        start, past = int(step.starts[n]), length - count
        for t in range(count):
            shown = np.arange(past + t + 1) if tree_mask is None else np.arange(length)
            position, place = past + t, shown.copy()
            if tree_mask is not None:
                bits = tree_mask[start : start + count].sum(1).numpy()
                position, place = past + bits[t] - 1, np.concatenate((np.arange(past), past + bits - 1))
                sees = np.concatenate((np.ones(past, bool), tree_mask[start + t, :count].numpy()))
                shown, place = shown[sees], place[sees]
            keep = np.ones(len(shown), bool)
            if window is not None:
                keep &= position - place < window
            if chunk is not None:
                keep &= place // chunk == position // chunk
            shown, place = shown[keep], place[keep]
            keys = step.rows(step.keys, n, shown)
            values = keys[..., :width] if value_dim is not None else step.rows(step.values, n, shown)
            largest = max(largest, np.abs(values).max(initial=0.0))
            for h in range(q_heads):
                kv = h // (q_heads // kv_heads)
                scores = scale * (keys[:, kv] @ q_all[start + t, h])
                if softcap is not None:
                    scores = softcap * np.tanh(scores / softcap)
                if slopes is not None:
                    scores = scores - float(slopes[h]) * (position - place)
                if bias is not None:
                    of_head = bias[h if len(bias) > 1 else 0].double().numpy()
                    scores = scores + (of_head[position - place] if bias.dim() == 2 else of_head[position, place])
                if not len(scores) or scores.max() == -np.inf:
                    continue
                top = max(scores.max(), -np.inf if sinks is None else float(sinks[h]))
                weights = np.exp(scores - top)
                total = weights.sum() + (0.0 if sinks is None else np.exp(float(sinks[h]) - top))
                out[start + t, h] = (weights / total) @ values[:, kv]
                lse[start + t, h] = top + np.log(total)
                np.add.at(mass[n, kv], shown, weights / total)
    return out, lse, mass, largest
