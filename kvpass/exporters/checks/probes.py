"""What an exported file is asked, and what the rewritten model answers: the ground of every audit.

A probe is a script of steps over three sequences: two of ragged lengths are read together, one of them in chunks and
longer than any window; they decode; a third begins with a prefix of the first and is read while the others decode; the
second ends, and a fourth begins in its place, where a cache holds what has to be written over. At each step of each
sequence the likeliest tokens and their logits are written down, as the rewritten model gives them for the sequence
alone. A file is right if it gives the same tokens, where the model itself tells two apart, and the same logits up to
rounding. Where a cache rounds its rows, what may come of numbers at the edge of a code is measured and written down as
well: see :mod:`~kvpass.exporters.checks.rounding_edges`.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor

from kvpass.exporters.checks.rounding_edges import CHUNK, InTorch, is_narrow, spread
from kvpass.fx_passes.lowering.bind import PagedModule
from kvpass.kernels.formats.cache_formats import allocate_cache
from kvpass.types import CachePlan, StepInputs

DECODED = 4  # steps of one token
TOP = 8  # logits that are written down of a row
# Largest difference of logits, as a part of the largest logit, by dtype of the model.
TOLERANCE = {torch.float64: 1e-3, torch.float32: 1e-3, torch.float16: 2e-2, torch.bfloat16: 5e-2}


def make_probe(module: PagedModule, context: int | None, by_reference: bool = False) -> dict[str, Any]:
    """A script and its answers, as plain data.

    Args:
        module: the rewritten model.
        context: places of a sequence in the file; None where there is no such limit.
        by_reference: whether the file calls no kernel of kvpass, and so rounds nothing but what the format does.
    """
    plan = module.plan
    prompts = _prompts(plan, context)
    sequences = [Sequence(module, prompt, by_reference) for prompt in prompts]
    shared = len(prompts[0]) * 2 // 3 // plan.block_size * plan.block_size
    script: list[dict[str, Any]] = []

    def step(*takes: tuple[int, int]) -> None:
        rows = [
            {"sequence": number, "tokens": sequences[number].take(count), **sequences[number].answer()}
            for number, count in takes
        ]
        script.append({"rows": rows})

    first = _chunks(len(prompts[0]), 2)
    step((0, first[0]), (1, len(prompts[1])))
    for count in first[1:]:
        step((0, count))
    for _ in range(DECODED):
        step((0, 1), (1, 1))
    script.append({"start": 2, "from": 0, "tokens": shared})
    sequences[2].skip(shared)
    for count in _chunks(len(prompts[2]) - shared, 1):
        step((2, count), (1, 1))
    for _ in range(DECODED):
        step((1, 1), (2, 1), (0, 1))
    script.extend(({"end": 1}, {"start": 3}))
    step((3, len(prompts[3])), (0, 1))
    step((0, 1), (3, 1))
    logits_dtype = sequences[0].dtype
    if is_narrow(plan, logits_dtype):
        rows = [row for entry in script for row in entry.get("rows", ())]
        for number, sequence in enumerate(sequences):
            own = [row for row in rows if row["sequence"] == number]
            for row, moved in zip(own, sequence.spread(), strict=True):
                row["spread"] = moved
    return {"script": script, "tolerance": TOLERANCE[logits_dtype]}


class Sequence:
    """A sequence that is read token by token, in caches of its own, and what the model answers."""

    def __init__(self, module: PagedModule, prompt: list[int], by_reference: bool) -> None:
        plan = module.plan
        self._module, self._tokens = module, list(prompt)
        self._read = self._computed = 0
        self._by_reference = by_reference
        self._answered: list[int] = []
        self._blocks = -(-(len(prompt) + 8 * DECODED) // plan.block_size)
        self._caches = [allocate_cache(spec, self._blocks, plan.block_size, module.device) for spec in plan.caches]
        self._row = torch.empty(0)

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the model's logits."""
        return self._row.dtype

    def take(self, count: int) -> list[int]:
        """The next tokens: of the prompt, and after it the likeliest ones."""
        while len(self._tokens) < self._read + count:
            row = self._logits().clone()
            row[list(self._module.plan.forbidden_tokens)] = -torch.inf
            self._tokens.append(int(row.argmax()))
        self._read += count
        return self._tokens[self._read - count : self._read]

    def skip(self, count: int) -> None:
        """Take tokens for read that another sequence has read."""
        self._read = count

    def answer(self) -> dict[str, Any]:
        """The likeliest tokens after what was read, with their logits, and the largest logit by size."""
        self._answered.append(self._read)
        row = self._logits().float()
        top = row.topk(min(TOP, len(row)))
        return {"top": top.indices.tolist(), "logits": top.values.tolist(), "scale": float(row.abs().max())}

    def spread(self) -> list[float]:
        """For each answer how far it moves where rows are nudged, as a part of the largest logit."""
        return spread(self._module, self._tokens, self._answered, self._by_reference)

    def _mode(self) -> AbstractContextManager[object]:
        return InTorch(by_reference=True) if self._by_reference else nullcontext()

    @torch.no_grad()
    def _logits(self) -> Tensor:
        """Logits ``[V]`` after all that was read."""
        plan, device = self._module.plan, self._module.device
        groups = len(plan.group_windows)
        tables = torch.arange(self._blocks, device=device).expand(groups, 1, -1).contiguous()
        while self._computed < self._read:
            ids = torch.tensor(self._tokens[self._computed : min(self._read, self._computed + CHUNK)], device=device)
            place = torch.arange(self._computed, self._computed + len(ids), device=device)
            self._computed += len(ids)
            ends, rows = torch.tensor([self._computed], device=device), torch.tensor([0, len(ids)], device=device)
            slots = place.expand(groups, -1).contiguous()
            step = StepInputs(ids, place, slots, tables, ends, rows, rows[1:] - 1)
            with self._mode():
                self._row = self._module(step, self._caches)[0]
        return self._row


def _prompts(plan: CachePlan, context: int | None) -> list[list[int]]:
    # While the third is read, a static file writes as much padding behind the first.
    room = (min(limit for limit in (context, plan.max_length, 1 << 20) if limit) - 4 * DECODED - 5) * 3 // 4
    reach = max((spec.window for spec in plan.caches if spec.window), default=0)
    longest = max(1, min(room, max(2 * plan.block_size, reach) + 9))
    generator = torch.Generator().manual_seed(0)
    allowed = torch.ones(plan.vocab_size, dtype=torch.bool)
    allowed[list(plan.forbidden_tokens)] = False
    ids = allowed.nonzero().flatten()

    def text(count: int) -> list[int]:
        return [int(token) for token in ids[torch.randint(len(ids), (count,), generator=generator)]]

    first = text(longest)
    second, third = text(min(3, longest)), first[: longest * 2 // 3] + text(min(5, longest))
    return [first, second, third, text(min(5, longest))]


def _chunks(count: int, least: int) -> list[int]:
    """``count`` tokens in parts of at most :data:`CHUNK`, and in at least so many parts."""
    size = min(CHUNK, -(-count // least))
    return [min(size, count - start) for start in range(0, count, size)]
