"""What an exported program takes and gives: its inputs by name, shape and meaning, and the step that they say.

Two contracts cover all formats. A *paged* program takes the new tokens of all sequences in one row, and block tables;
a *static* one takes a batch of equal width, whose rows own their part of the cache. Both work out positions and slots
themselves, so that there is little for a caller to get wrong.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol

import torch
from torch import Tensor

from kvpass.exporters.dialects.coded_caches import Piece, pieces
from kvpass.exporters.dialects.lowerings import Step
from kvpass.exporters.dialects.onnx_rows import KEYS, PAST
from kvpass.exporters.dialects.plain_ops import Keys, sequence_of
from kvpass.kernels.formats.cache_formats import find_format
from kvpass.types import CachePlan, CacheSpec, dtype_name


@dataclass(frozen=True)
class Port:
    """One input or output of a program.

    Attributes:
        name: in the file.
        dtype: of the tensor.
        shape: a number, or the name of a size that may change from call to call, for each dim.
        meaning: one sentence.
        cache: the graph's input that it is (a part of); None for what is no cache.
    """

    name: str
    dtype: torch.dtype
    shape: tuple[int | str, ...]
    meaning: str
    cache: str | None = None

    def to_dict(self) -> dict[str, Any]:
        """As it stands in a manifest."""
        return {"name": self.name, "dtype": dtype_name(self.dtype), "shape": list(self.shape), "meaning": self.meaning}


class Contract(Protocol):
    """How a program is called."""

    def inputs(self, plan: CachePlan) -> list[Port]:
        """All inputs in order, the caches last."""

    def step(self, plan: CachePlan, values: Sequence[Tensor], caches: Sequence[Tensor]) -> Step:
        """The step that the inputs say, those before the caches and the caches."""

    def logits(self, rows: Tensor) -> Tensor:
        """The logits ``[R, V]`` in the shape in which they are given."""

    def examples(self, plan: CachePlan) -> list[Tensor]:
        """Values of the inputs before the caches, of sizes that are all different."""


TOKENS = "token ids of the new tokens"
WIDEST = "0, 1, ... to before the most new tokens that a sequence has, or further"


def proven(plan: CachePlan, token_ids: Tensor, seq_lens: Tensor, is_token: Tensor | None = None) -> Tensor:
    """Whether sequences are such that the rewrite is proven for them, a bool scalar.

    Args:
        plan: says how long they may be, and which ids may not occur.
        token_ids: new ones, of any shape.
        seq_lens: int64 ``[N]``.
        is_token: which of the ids are tokens and no padding; None for all.
    """
    holds = (seq_lens >= 1).all()
    if plan.max_length is not None:
        holds = holds & (seq_lens <= plan.max_length).all()
    for token in plan.forbidden_tokens:
        differs = token_ids != token
        holds = holds & (differs if is_token is None else differs | ~is_token).all()
    return holds


def cache_ports(plan: CachePlan, leading: tuple[int | str, ...], length: int | str, apart: bool = True) -> list[Port]:
    """The tensors of all caches, ``[leading, heads, length, width]``; none for rows without numbers.

    Codes, scales and offsets are tensors of their own where they lie ``apart``, else one tensor of bytes.
    """
    ports = []
    for number, spec in enumerate(plan.caches):
        for part, dim, form in _parts(spec):
            row, meaning = find_format(form), f"{part}s of {', '.join(spec.sites)}, as {form}"
            for piece in (pieces(row, dim) if apart else (Piece("", row.dtype, row.stored_width(dim)),)) if dim else ():
                name = f"{part}_cache_{number}"
                shape = (*leading, spec.num_kv_heads, length, piece.width)
                more = f": {piece.meaning}" if piece.meaning else ""
                ports.append(Port(name + piece.suffix, piece.dtype, shape, meaning + more, name))
    return ports


def _parts(spec: CacheSpec) -> list[tuple[str, int, str]]:
    return [("key", spec.key_dim, spec.key_format), ("value", spec.value_dim, spec.value_format)]


@dataclass(frozen=True)
class Paged:
    """All new tokens in one row, block tables and pools of blocks.

    Attributes:
        says_widest: whether the most new tokens of a sequence are an input, for compilers that have to know each size.
        apart: whether codes and scales of a cache are tensors of their own, for runtimes that cannot take bytes apart.
    """

    says_widest: bool = False
    apart: bool = True

    def inputs(self, plan: CachePlan) -> list[Port]:
        """All inputs in order, the caches last."""
        groups, size = len(plan.group_windows), plan.block_size
        int64 = torch.int64
        return [
            Port("token_ids", int64, ("tokens",), f"{TOKENS} of all sequences, one sequence after the other"),
            Port("new_lens", int64, ("sequences",), "new tokens of each sequence, at least one"),
            Port("seq_lens", int64, ("sequences",), "length of each sequence, its new tokens included"),
            Port(
                "block_tables", int64, (groups, "sequences", "blocks_of_a_sequence"),
                f"blocks of each sequence in order, {size} tokens each; entries past its end may be anything",
            ),
            Port("logits_index", int64, ("rows",), "the tokens, as rows of token_ids, whose logits are wanted"),
            *([Port("columns", int64, ("widest",), WIDEST)] if self.says_widest else []),
            *cache_ports(plan, ("blocks",), size, self.apart),
        ]  # fmt: skip

    def step(self, plan: CachePlan, values: Sequence[Tensor], caches: Sequence[Tensor]) -> Step:
        """Positions and slots of the new tokens."""
        token_ids, new_lens, seq_lens, block_tables, logits_index, *columns = values
        starts = torch.cat((new_lens.new_zeros(1), new_lens.cumsum(0)))
        token = torch.arange(token_ids.shape[0], device=token_ids.device)
        owner = sequence_of(starts, token)
        positions = (seq_lens - new_lens)[owner] + token - starts[owner]
        slots = block_tables[:, owner, positions // plan.block_size] * plan.block_size + positions % plan.block_size
        widest = columns[0] if columns else None
        fits = (new_lens >= 1).all() & (new_lens <= seq_lens).all() & proven(plan, token_ids, seq_lens)
        if widest is not None:
            fits = fits & (new_lens <= widest.shape[0]).all()
        return Step(token_ids, positions, logits_index, seq_lens, fits, starts, block_tables, slots, widest)

    def logits(self, rows: Tensor) -> Tensor:
        """The logits as they are."""
        return rows

    def examples(self, plan: CachePlan) -> list[Tensor]:
        """Three sequences of 4, 2 and 3 new tokens."""
        new, lens = torch.tensor([4, 2, 3]), torch.tensor([4, 2 + plan.block_size, 3])
        tables = 1 + torch.arange(15).view(3, 5).expand(len(plan.group_windows), -1, -1)
        values = [torch.arange(9) % plan.vocab_size, new, lens, tables.contiguous(), torch.tensor([3, 8])]
        return [*values, torch.arange(4)] if self.says_widest else values


@dataclass(frozen=True)
class Static:
    """A batch whose rows own ``context`` places each.

    Attributes:
        context: places of a row.
    """

    context: int

    def inputs(self, plan: CachePlan) -> list[Port]:
        """All inputs in order, the caches last."""
        int64 = torch.int64
        return [
            Port("token_ids", int64, ("batch", "width"), f"{TOKENS} of each row, padded on the right with any id"),
            Port("past_lens", int64, ("batch",), "tokens of each row that are in the caches"),
            Port("new_lens", int64, ("batch",), "new tokens of each row without the padding, at least one"),
            *cache_ports(plan, ("batch",), self.context),
        ]

    def step(self, plan: CachePlan, values: Sequence[Tensor], caches: Sequence[Tensor]) -> Step:
        """Positions of all tokens, and the last row of each sequence."""
        token_ids, past_lens, new_lens = values
        rows, width = token_ids.shape
        columns = torch.arange(width, device=token_ids.device)
        positions = (past_lens[:, None] + columns).flatten()
        last = torch.arange(rows, device=token_ids.device) * width + new_lens.clamp(1, width) - 1
        seq_lens, is_new = past_lens + new_lens, columns < new_lens[:, None]
        fits = (new_lens >= 1).all() & (new_lens <= width).all() & (past_lens >= 0).all()
        fits = fits & (past_lens + width <= self.context).all() & proven(plan, token_ids, seq_lens, is_new)
        step = Step(token_ids.flatten(), positions, last, seq_lens, fits, width=width)
        # A query stands behind all that its row holds: what lies further on, padding included, it does not see.
        step.shared |= {PAST: past_lens, KEYS: Keys(torch.arange(self.context, device=token_ids.device), None)}
        return step

    def logits(self, rows: Tensor) -> Tensor:
        """The logits as they are."""
        return rows

    def examples(self, plan: CachePlan) -> list[Tensor]:
        """Three rows of up to five new tokens."""
        ids = torch.arange(15).view(3, 5) % plan.vocab_size
        return [ids, torch.tensor([0, 2, 4]), torch.tensor([5, 3, 2])]


@dataclass(frozen=True)
class Growing:
    """A batch whose caches grow by the new tokens, as ONNX Runtime GenAI and transformers hand them on.

    ``attention_mask`` says which tokens are there, past and new; padding may be anywhere but at the end of a row, and a
    token's position is the number of tokens before it.
    """

    def inputs(self, plan: CachePlan) -> list[Port]:
        """All inputs in order, the caches last."""
        int64 = torch.int64
        mask = "1 for each token, past and new, 0 for padding"
        ports = [
            Port("input_ids", int64, ("batch", "width"), f"{TOKENS} of each row"),
            Port("attention_mask", int64, ("batch", "total"), mask),
        ]
        names = {"key": "past_key_values.{}.key", "value": "past_key_values.{}.value"}
        for port in cache_ports(plan, ("batch",), "past"):
            assert port.cache is not None
            part, _, number = port.cache.split("_")
            ports.append(replace(port, name=names[part].format(number)))
        return ports

    def step(self, plan: CachePlan, values: Sequence[Tensor], caches: Sequence[Tensor]) -> Step:
        """Positions by counting, and the last row of each sequence."""
        token_ids, mask = values
        rows, width = token_ids.shape
        places = (mask.cumsum(1) - 1).clamp(min=0)
        positions = places[:, -width:]
        last = torch.arange(1, rows + 1, device=token_ids.device) * width - 1
        seq_lens, is_new = mask.sum(1), mask[:, -width:] != 0
        fits = is_new[:, -1].all() & proven(plan, token_ids, seq_lens, is_new)
        step = Step(token_ids.flatten(), positions.flatten(), last, seq_lens, fits, width=width)
        # Chosen by number: that the mask is as long as the caches will be, torch.export has no words for.
        all_of_them = torch.arange(caches[0].shape[2] + width, device=mask.device)
        step.shared[KEYS] = Keys(places[:, all_of_them], mask[:, all_of_them] != 0)
        return step

    def logits(self, rows: Tensor) -> Tensor:
        """The logits ``[batch, 1, V]``."""
        return rows.unsqueeze(1)

    def examples(self, plan: CachePlan) -> list[Tensor]:
        """Three rows of five new tokens, padded on the left."""
        mask = torch.ones(3, 12, dtype=torch.int64)
        mask[1, :4] = 0
        return [torch.arange(15).view(3, 5) % plan.vocab_size, mask]
