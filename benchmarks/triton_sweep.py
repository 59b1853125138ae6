"""Random calls of the Triton kernels against float64, in Triton's interpreter or on a GPU.

    TRITON_INTERPRET=1 python benchmarks/triton_sweep.py --cases 2000 --seed 0 --output results.json
    python benchmarks/triton_sweep.py --device cuda

Each case draws an op, formats, shapes and features by its own seed, ``--seed`` + its number, so that a failure is
repeated with ``--cases 1 --seed N``. Caches are NaN outside their sequences, block tables lead out of the cache past
their ends, and memory that a kernel should write holds NaN before.
"""

from __future__ import annotations

import argparse
import collections
import json
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
import triton
import triton_cases as cases
from torch import Tensor

from kvpass.kernels.ops import argument_names
from kvpass.kernels.triton_kernels import backend
from kvpass.kernels.triton_kernels.launch import INTERPRETED, Target
from kvpass.kernels.triton_kernels.tuning import TILES

KINDS = ("paged", "paged", "paged", "stats", "latent", "cascade", "tree", "write", "fused", "gather", "copy")
ROUNDING = {torch.float32: 2.0**-22, torch.float16: 2.0**-11, torch.bfloat16: 2.0**-8}
if INTERPRETED:  # the interpreter cuts a float32 off where a GPU rounds it
    ROUNDING[torch.bfloat16] = 2.0**-7


class Case:
    """One random call. ``run`` raises AssertionError if the kernels are wrong; ``label`` says what was drawn."""

    def __init__(self, seed: int, device: str) -> None:
        self.random = np.random.default_rng(seed)
        self.device = device
        self.kind = str(self.random.choice(KINDS))
        self.q_heads, self.heads = cases.HEADS[self.random.integers(len(cases.HEADS))]
        self.dtype = self.pick((torch.float32, torch.float16, torch.bfloat16))
        self.formats = (self.pick(cases.FORMATS), self.pick(cases.FORMATS))
        if self.random.random() < 0.6:
            self.formats = (self.formats[0], self.formats[0])
        self.size = self.pick((16, 16, 32, 64))
        limit = 576 if self.random.random() < 0.15 else 128
        dims = [dim for dim in cases.DIMS if dim <= limit]
        self.dims = (self.pick(dims), self.pick(dims))
        if self.random.random() < 0.6:
            self.dims = (self.dims[0], self.dims[0])
        if max(self.dims) > 128:  # in float32, these are refused
            self.dtype = self.pick((torch.float16, torch.bfloat16))
            wide = (str(self.dtype).removeprefix("torch."), *cases.FORMATS[3:])
            self.formats = (self.pick(wide), self.pick(wide))
        self.features: dict[str, Any] = {}
        if INTERPRETED:
            target = Target(self.pick(tuple(TILES)), int(self.random.integers(1, 7)), self.chance(0.5), True)
            backend.find_target = lambda device: target

    def pick(self, choices: Any) -> Any:
        return choices[int(self.random.integers(len(choices)))]

    def chance(self, likely: float) -> bool:
        return bool(self.random.random() < likely)

    def normal(self, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.from_numpy(self.random.normal(size=shape).astype(np.float32)).to(dtype)

    @property
    def label(self) -> str:
        shapes = f"heads {self.q_heads}/{self.heads} dims {self.dims} P {self.size}"
        return f"{self.kind} {'/'.join(self.formats)} {shapes} {self.dtype} {sorted(self.features)}"

    def run(self) -> float:
        """The largest error as a part of its bound."""
        return getattr(self, f"run_{self.kind}")()

    def to_device(self, *tensors: Any) -> list[Any]:
        return [x.to(self.device) if isinstance(x, Tensor) else x for x in tensors]

    def call(self, op: str, *arguments: Any, **named: Any) -> Any:
        named = dict(zip(named, self.to_device(*named.values()), strict=True))
        arguments = tuple(self.to_device(*arguments))
        given = dict(zip(argument_names(op), arguments, strict=False)) | named
        why = backend.unsupported(op, **given)
        assert why is None, why
        return getattr(backend, op)(*arguments, **named)

    def draw_lengths(self) -> tuple[list[int], list[int]]:
        sequences = int(self.random.integers(1, 5))
        longest = self.pick((20, 70, 200))
        lengths = [int(self.random.integers(1, longest)) for _ in range(sequences)]
        decode = self.chance(0.5)
        counts = [1 if decode else int(self.random.integers(0, min(length, 24) + 1)) for length in lengths]
        if not sum(counts):
            counts[0] = 1
        return lengths, counts

    def draw_features(self, longest: int, sharing: bool = False) -> dict[str, Any]:
        found: dict[str, Any] = {}
        if self.chance(0.3):
            found["softcap"] = float(self.random.uniform(1, 20))
        if self.chance(0.3) and not (sharing and self.chance(0.8)):
            found["window"] = int(self.random.integers(1, longest + 4))
        if self.chance(0.2) and not (sharing and self.chance(0.8)):
            found["chunk"] = int(self.random.integers(1, longest + 4))
        if self.chance(0.3):
            found["slopes"] = torch.rand(self.q_heads, generator=torch.Generator().manual_seed(1))
        if self.chance(0.3):
            found["sinks"] = self.normal(self.q_heads) * 3
        if self.chance(0.3):
            rows = self.pick((1, self.q_heads))
            shape = (rows, longest) if self.chance(0.5) else (rows, longest, longest)
            bias = self.normal(*shape)
            bias[torch.from_numpy(self.random.random(shape) < self.pick((0.1, 0.9)))] = -torch.inf
            found["bias"] = bias
        self.features = found
        return found

    def close(self, got: Tensor, want: np.ndarray, bound: float) -> float:
        found = got.detach().double().cpu().numpy()
        assert found.shape == want.shape, f"shape {found.shape}, not {want.shape}"
        blind = np.isneginf(want)
        assert (np.isneginf(found) == blind).all(), "-inf elsewhere"
        error = np.abs(np.where(blind, 0, found) - np.where(blind, 0, want)).max(initial=0.0)
        assert error <= bound, f"error {error:.3g} above its bound {bound:.3g}"
        return float(error / bound)

    def bound(self, largest: float, dtype: torch.dtype | None = None) -> float:
        """Weights are rounded to the dtype of their dot and outputs to that of the query; sums are float32."""
        small = self.formats[1] not in cases.FLOATS and self.dtype != torch.float32
        rounding = ROUNDING[torch.float16 if small else self.dtype] + ROUNDING[self.dtype]
        return (rounding + 2e-5) * max(largest, 1e-3)

    def run_paged(self, stats: bool = False, tree: bool = False) -> float:
        lengths, counts = self.draw_lengths()
        features = self.draw_features(max(lengths) + 1)
        step = cases.make_step(self.random, self.formats, self.heads, self.dims, self.size, lengths, counts)
        if tree:
            width = max(counts) + self.pick((0, 3))
            mask = torch.zeros(sum(counts), width, dtype=torch.bool)
            for start, count in zip(step.starts[:-1], counts, strict=True):
                for t in range(count):  # what its parent sees, and itself
                    parent = int(self.random.integers(-1, t))
                    if parent >= 0:
                        mask[start + t] = mask[start + parent]
                    mask[start + t, t] = True
            features["tree_mask"] = mask
        oldest = [length - count for length, count in zip(lengths, counts, strict=True)]
        if "window" in features:
            oldest = [max(0, past - tree - features["window"] + 1) for past in oldest]
        else:
            oldest = [0] * len(lengths)
        query = self.normal(sum(counts), self.q_heads, self.dims[0], dtype=self.dtype)
        scale = float(self.dims[0] ** -0.5)
        out, lse, mass, largest = cases.attend(step, query, scale, **features)
        for n, first in enumerate(oldest):
            step.tables[n, : first // self.size] = cases.BEYOND
        names = self.format_arguments()
        arguments = (query, step.keys.tensor(), step.values.tensor(), *step.arguments(), scale)
        if not stats:
            return self.close(self.call("paged_attention", *arguments, **features, **names), out, self.bound(largest))
        got = self.call("paged_attention_stats", *arguments, **features, **names, mass=True)
        worst = self.close(got[0], out, self.bound(largest))
        worst = max(worst, self.close(got[1], lse, 3e-4))
        return max(worst, self.close(got[2], mass, 3e-4 * max(1.0, mass.max(initial=0.0))))

    def run_stats(self) -> float:
        return self.run_paged(stats=True, tree=self.chance(0.3))

    def run_tree(self) -> float:
        return self.run_paged(tree=True)

    def format_arguments(self) -> dict[str, str]:
        names = zip(("key_format", "value_format"), self.formats, strict=True)
        return {argument: name for argument, name in names if name in ("int8", "int4") or self.chance(0.5)}

    def run_latent(self) -> float:
        self.heads, self.formats = 1, (self.formats[0], self.formats[0])
        self.q_heads = self.pick((1, 4, 16, 24))
        lengths, counts = self.draw_lengths()
        features = self.draw_features(max(lengths) + 1)
        exact = self.dtype == getattr(torch, self.formats[0], self.dtype) or self.formats[0] not in cases.FLOATS
        width = self.pick((48, 72, 80, 96, 576 if exact and self.dtype != torch.float32 else 128))
        value_dim = self.pick([width, width * 2 // 3, width - 16, 512 if width == 576 else 32])
        step = cases.make_step(self.random, self.formats, 1, (width, 16), self.size, lengths, counts)
        query = self.normal(sum(counts), self.q_heads, width, dtype=self.dtype)
        scale = float(width**-0.5)
        self.dims = (width, value_dim)
        out, _, _, largest = cases.attend(step, query, scale, value_dim, **features)
        got = self.call(
            "latent_attention", query, step.keys.tensor(), *step.arguments(), scale, value_dim, **features,
            format=self.formats[0],
        )  # fmt: skip
        return self.close(got, out, self.bound(largest))

    def run_cascade(self) -> float:
        groups = [int(self.random.integers(1, 4)) for _ in range(int(self.random.integers(1, 3)))]
        blocks = [int(self.random.integers(0, 4)) for _ in groups]
        lengths, counts, shared, first = [], [], [], 0
        for members, some in zip(groups, blocks, strict=True):
            shared.append((first, members, some * self.size))
            first += members
            for _ in range(members):
                counts.append(self.pick((0, 1, 1, 1, 5)))
                lengths.append(some * self.size + counts[-1] + int(self.random.integers(0, 40)))
        if not sum(counts):
            counts[0], lengths[0] = 1, lengths[0] + 1
        features = self.draw_features(max(lengths) + 1, sharing=True)
        step = cases.make_step(self.random, self.formats, self.heads, self.dims, self.size, lengths, counts, shared)
        query = self.normal(sum(counts), self.q_heads, self.dims[0], dtype=self.dtype)
        scale = float(self.dims[0] ** -0.5)
        out, _, _, largest = cases.attend(step, query, scale, **features)
        starts = torch.tensor([0, *np.cumsum(groups)])
        tokens = torch.tensor([tokens for _, _, tokens in shared])
        got = self.call(
            "cascade_attention", query, step.keys.tensor(), step.values.tensor(), *step.arguments(), starts, tokens,
            scale, **features, **self.format_arguments(),
        )  # fmt: skip
        return self.close(got, out, self.bound(largest))

    def draw_write(self) -> tuple[Tensor, Tensor, Tensor, list[cases.Cache]]:
        tokens, blocks = int(self.random.integers(1, 40)), 4
        slots = torch.from_numpy(self.random.permutation(blocks * self.size)[:tokens].astype(np.int64))
        key = self.normal(len(slots), self.heads, self.dims[0] + 3, dtype=self.dtype)[..., : self.dims[0]]
        value = self.normal(len(slots), self.heads, self.dims[1], dtype=self.dtype)
        for rows in (key, value):
            rows *= torch.from_numpy(np.exp(self.random.normal(size=(len(slots), self.heads, 1)) * 4)).to(self.dtype)
            rows[0, 0] = 0
            if self.chance(0.2):
                rows[-1, -1, -1] = self.pick((torch.inf, -torch.inf, torch.nan))
        caches = [
            cases.Cache(name, blocks, self.heads, self.size, dim)
            for name, dim in zip(self.formats, self.dims, strict=True)
        ]
        return key, value, slots, caches

    def check_written(self, key: Tensor, value: Tensor, slots: Tensor, wrote: list[Tensor], wanted: Any) -> float:
        for rows, cache, tensor in zip((key, value), wanted, wrote, strict=True):
            place = slots.numpy()
            cache.write(place // self.size, place % self.size, rows.float().numpy())
            want, got = cache.tensor(), tensor.cpu()
            same = want.view(-1).view(torch.uint8) == got.view(-1).view(torch.uint8)
            if not cache.scaled:  # NaNs have several spellings
                same = (want == got) | (want.float().isnan() & got.float().isnan())
                if INTERPRETED and cache.name == "bfloat16":
                    same |= (want.float() - got.float()).abs() <= want.float().abs() / 128
            elif cache.name == "int8":
                same |= self.both_nan(cache, got, want)
            else:
                same |= cache.as_good(place // self.size, place % self.size, rows.float().numpy(), got)
            assert bool(same.all()), f"{int((~same).sum())} stored numbers of {cache.name} differ"
        return 0.0

    @staticmethod
    def both_nan(cache: cases.Cache, got: Tensor, want: Tensor) -> Tensor:
        """The bytes of scales that are NaN in both."""
        blocks, heads = got.shape[:2]
        codes = cases.stored_row(cache.name, cache.dim) * cache.size
        tails = [
            x.reshape(blocks, heads, -1)[..., codes:].contiguous().view(torch.float32).isnan() for x in (got, want)
        ]
        both = (tails[0] & tails[1]).repeat_interleave(4, 2)
        return torch.cat((both.new_zeros(blocks, heads, codes), both), 2).view(-1)

    def run_write(self) -> float:
        key, value, slots, caches = self.draw_write()
        wrote = self.to_device(*(cache.tensor() for cache in caches))
        self.call("write_cache", key, value, *wrote, slots, **self.format_arguments())
        return self.check_written(key, value, slots, wrote, caches)

    def run_fused(self) -> float:
        key, value, slots, caches = self.draw_write()
        key, value = (x.nan_to_num(1.0, 1.0, -1.0).clamp(-9, 9) for x in (key, value))
        width, tokens = self.dims[0], len(slots)
        query = self.normal(tokens, self.q_heads, width, dtype=self.dtype)
        weights = [self.normal(width), self.normal(width)] if self.chance(0.6) else [None, None]
        rotary = self.pick((0, width, width // 2, 8))
        angle = self.normal(tokens, rotary) if rotary else None
        cos, sin = (None, None) if angle is None else (angle.cos(), angle.sin())
        interleaved = self.chance(0.5)
        self.formats = tuple("float32" if self.chance(0.7) else name for name in self.formats)
        caches = [
            cases.Cache(name, 4, self.heads, self.size, d) for name, d in zip(self.formats, self.dims, strict=True)
        ]
        wrote = self.to_device(*(cache.tensor() for cache in caches))
        self.features = {"rotary": rotary, "interleaved": interleaved, "norm": weights[0] is not None}
        got = self.call(
            "norm_rotary_write", query, key, value, *wrote, slots, *weights, 1e-6, cos, sin, interleaved,
            **self.format_arguments(),
        )  # fmt: skip
        turned = [
            turn(rows.double(), weight, cos, sin, interleaved)
            for rows, weight in zip((query, key), weights, strict=True)
        ]
        rounding = 2 * ROUNDING[self.dtype] + 1e-5
        worst = self.close(got, turned[0].numpy(), rounding * max(1.0, float(turned[0].abs().max())))
        step = {"int8": 1 / 250, "int4": 1 / 13.9, "fp8_e4m3": 1 / 15.9, "fp8_e5m2": 1 / 7.9, "bfloat16": 1 / 128}
        for cache, tensor, rows in zip(caches, wrote, (turned[1], value.double()), strict=True):
            cache.bytes[...] = tensor.cpu().contiguous().view(-1).view(torch.uint8).numpy().reshape(cache.bytes.shape)
            found = cache.read(slots.numpy() // self.size, slots.numpy() % self.size)
            largest = np.maximum(rows.abs().amax(2, keepdim=True).numpy(), 0.02)
            relative = (found - rows.numpy()) / largest
            if cache.name == "int4":  # bounded over a row, of which a number may be cut off
                relative = np.sqrt(np.mean(np.square(relative), -1))
            error = np.abs(relative).max(initial=0.0)
            assert error <= step.get(cache.name, 1e-3), f"{cache.name} off by {error:.3g}"
        return worst

    def run_gather(self) -> float:
        lengths, counts = self.draw_lengths()
        step = cases.make_step(self.random, self.formats, self.heads, self.dims, self.size, lengths, counts)
        want = np.zeros((len(lengths), step.tables.shape[1] * self.size, self.heads, self.dims[0]))
        for n, length in enumerate(lengths):
            want[n, :length] = step.rows(step.keys, n, np.arange(length))
        got = self.call("gather_cache", step.keys.tensor(), *step.arguments()[:2], self.dims[0], format=self.formats[0])
        return self.close(got, want, 1e-6 * max(1.0, np.abs(want).max()))

    def run_copy(self) -> float:
        caches = [
            cases.Cache(name, 7, self.heads, self.size, dim) for name, dim in zip(self.formats, self.dims, strict=True)
        ]
        for cache in caches:
            cache.bytes[...] = self.random.integers(0, 256, cache.bytes.shape)
        order = self.random.permutation(7)
        pairs = int(self.random.integers(0, 4))
        source, target = order[:pairs], self.random.permutation(7)[:pairs]
        tensors = self.to_device(*(cache.tensor() for cache in caches))
        self.call("copy_blocks", tensors, torch.from_numpy(source), torch.from_numpy(target))
        for cache, tensor in zip(caches, tensors, strict=True):
            cache.bytes[target] = cache.bytes[source]
            want = cache.tensor().view(-1).view(torch.uint8)
            assert torch.equal(tensor.cpu().view(-1).view(torch.uint8), want), "copied bytes differ"
        return 0.0


def turn(x: Tensor, weight: Tensor | None, cos: Tensor | None, sin: Tensor | None, interleaved: bool) -> Tensor:
    """RMS norm and rotary embedding in float64."""
    if weight is not None:
        x = x / (x.square().mean(2, keepdim=True) + 1e-6).sqrt() * weight.double()
    if cos is None:
        return x
    width = cos.shape[1]
    part = x[..., :width]
    if interleaved:
        other = torch.stack((-part[..., 1::2], part[..., ::2]), 3).flatten(2)
    else:
        other = torch.cat((-part[..., width // 2 :], part[..., : width // 2]), 2)
    turned = part * cos.double()[:, None] + other * sin.double()[:, None]
    return torch.cat((turned, x[..., width:]), 2)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", type=int, default=2000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--output", type=Path)
    options = parser.parse_args()
    torch.use_deterministic_algorithms(True)  # fills memory with NaN before it is written
    began, failures = time.time(), []
    counted: collections.Counter[str] = collections.Counter()
    worst: dict[str, float] = collections.defaultdict(float)
    for seed in range(options.seed, options.seed + options.cases):
        case = Case(seed, options.device)
        try:
            worst[case.kind] = max(worst[case.kind], case.run())
        except Exception as error:
            failures.append(f"seed {seed}: {case.label}: {type(error).__name__} {str(error)[:300]}")
            print(failures[-1], flush=True)
        counted[case.kind] += 1
    found = {
        "cases": options.cases, "first_seed": options.seed, "failures": failures,
        "by_op": dict(sorted(counted.items())),
        "worst_part_of_bound": {kind: round(part, 3) for kind, part in sorted(worst.items())},
        "device": torch.cuda.get_device_name() if options.device != "cpu" else "Triton's interpreter",
        "torch": torch.__version__, "triton": triton.__version__, "seconds": round(time.time() - began),
        "date": time.strftime("%Y-%m-%d"),
    }  # fmt: skip
    print(json.dumps(found, indent=1))
    if options.output:
        options.output.write_text(json.dumps(found, indent=1) + "\n")
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
