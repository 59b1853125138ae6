"""What is stored for an attention: its keys and values, or something narrower with their weights absorbed."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.fx import Node

from kvpass.config import CacheConfig
from kvpass.fx_passes.graph import arguments, shape_of
from kvpass.fx_passes.planning.absorb import Absorption
from kvpass.fx_passes.planning.linear_forms import (
    Form,
    FormReader,
    NotLinear,
    Row,
    is_linear,
    is_shifted,
    row_places,
    with_places,
)
from kvpass.fx_passes.planning.minimum_cut import Cut, is_move, minimum_cut, narrowest_cut, offsets_of
from kvpass.fx_passes.planning.value_numbering import EntryClasses
from kvpass.fx_passes.shape_values import ShapeEvaluator
from kvpass.fx_passes.token_axis.infer_axes import Inference
from kvpass.types import MaskMeaning


@dataclass(frozen=True, eq=False)
class StoredHeads:
    """Which entries of a token's row are the stored heads.

    Attributes:
        nodes: the nodes of the cut that the row is made of.
        offsets: where each node's entries start in the row.
        width: entries of the row.
        key_places: int64 ``[Hkv, D]``.
        value_places: int64 ``[Hkv, Dv]``.
        joint: values are the first Dv entries of the key rows, and are not stored a second time.
        content: classes of the entries of keys and values, see
            :class:`~kvpass.fx_passes.planning.value_numbering.EntryClasses`.
        structure: the same, of entries that are equal whatever the values of the weights are.
    """

    nodes: tuple[Node, ...]
    offsets: tuple[int, ...]
    width: int
    key_places: Tensor
    value_places: Tensor
    joint: bool = False
    content: tuple[tuple[int, ...], ...] = ()
    structure: tuple[tuple[int, ...], ...] = ()

    def same(self, other: StoredHeads) -> bool:
        """Whether the same numbers are stored in the same places."""
        shapes = [(heads.key_places.shape, heads.value_places.shape, heads.joint) for heads in (self, other)]
        return shapes[0] == shapes[1] and self.content == other.content

    def dtype(self, places: Tensor) -> torch.dtype:
        """The dtype that holds exactly what the row's nodes hold at these places."""
        low, high = int(places.min()), int(places.max())
        dtype: torch.dtype | None = None
        ends = [*self.offsets[1:], self.width]
        for node, start, end in zip(self.nodes, self.offsets, ends, strict=True):
            if start <= high and end > low:
                own = node.meta["val"].dtype
                dtype = own if dtype is None else torch.promote_types(dtype, own)
        assert dtype is not None
        return dtype


@dataclass(frozen=True, eq=False)
class Reading:
    """What is stored for an attention, and how it is read.

    Attributes:
        stored: the heads of its cache.
        head_order: query heads ordered so that those of one KV head stand together; None when they do already.
        absorption: how keys and values follow from the stored heads; None where they are those.
    """

    stored: StoredHeads
    head_order: tuple[int, ...] | None
    absorption: Absorption | None


@dataclass(frozen=True, eq=False)
class _Candidate:
    """One way to store, with U heads that differ.

    Attributes:
        stored: rows of the U heads, those that are equal not merged yet.
        key: keys of the U heads.
        value: values of the U heads.
        kept: which of the U rows are stored.
        group_of: for each of the U heads the stored row that it reads.
        size: bytes per token.
        work: products per query head and cached token.
    """

    stored: StoredHeads
    key: Form
    value: Form
    kept: tuple[int, ...]
    group_of: tuple[int, ...]
    size: int
    work: int


def store_heads(classes: EntryClasses, node: Node, mask: MaskMeaning, config: CacheConfig) -> Reading:
    """Choose what is stored for an attention.

    The fewest bytes win, among those ways that make the attention cost less than they save: where it multiplies more
    numbers per cached token, the bytes must shrink by a larger factor. ``CacheConfig(recompute=True)`` lifts that
    bound.

    Args:
        classes: which entries of the graph's nodes are equal.
        node: the canonical attention.
        mask: what its mask means.
        config: the cache's dtype, and whether more may be computed to store less.
    """
    named = arguments(node)
    inference, evaluator = classes.inference, classes.evaluator
    cut = narrowest_cut(inference, evaluator, named["key"], named["value"])
    first = _first_equal(classes.of_row(cut.nodes))
    cut = replace(cut, key_map=first[cut.key_map], value_map=first[cut.value_map])
    heads, reads = _distinct_heads(cut, int(shape_of(named["query"])[1]))
    plain = (Row(cut.key_map[heads]), Row(cut.value_map[heads]))
    expanded, *others = _candidates(cut.nodes, cut.offsets, cut.width, *plain, config)
    others += _absorbed(inference, evaluator, node, mask, cut, heads, config)
    chosen = expanded
    for candidate in others:
        cheap = candidate.work * candidate.size < expanded.work * expanded.size
        if candidate.size < chosen.size and (cheap or config.recompute):
            chosen = candidate
    return _reading(chosen, reads, classes)


def _first_equal(classes: Tensor) -> Tensor:
    """The place of the first entry of each entry's class."""
    first: dict[int, int] = {}
    return torch.tensor([first.setdefault(number, place) for place, number in enumerate(classes.tolist())])


def _distinct_heads(cut: Cut, query_heads: int) -> tuple[list[int], list[int]]:
    """KV heads of the attention that differ, and which of them each query head reads."""
    repeat = query_heads // cut.key_map.shape[0]
    pairs = [(tuple(k), tuple(v)) for k, v in zip(cut.key_map.tolist(), cut.value_map.tolist(), strict=True)]
    first = list(dict.fromkeys(pairs))
    reads = [first.index(pairs[h // repeat]) for h in range(query_heads)]
    if len({reads.count(g) for g in range(len(first))}) > 1:
        # groups of different sizes have no grouped form: every query head gets its own
        return [h // repeat for h in range(query_heads)], list(range(query_heads))
    return [pairs.index(pair) for pair in first], reads


def _absorbed(
    inference: Inference,
    evaluator: ShapeEvaluator,
    node: Node,
    mask: MaskMeaning,
    cut: Cut,
    heads: list[int],
    config: CacheConfig,
) -> list[_Candidate]:
    """Ways to store what the attention's keys and values are linear maps of."""
    named = arguments(node)
    key, value = named["key"], named["value"]
    nodes = minimum_cut(inference, key, value, lambda n: is_move(n) or is_linear(inference, n))
    if nodes == cut.nodes:
        return []
    offsets, width = offsets_of(inference, nodes)
    reader = FormReader(inference, evaluator, nodes)
    try:
        forms = [reader.read(n, _entries(n, heads)) for n in (key, value)]
    except NotLinear:
        return []
    unlimited = named["softcap"] is None and named["sinks"] is None
    whole = named["sinks"] is None and mask.bias is None and (mask.window is None or mask.window > 0)
    if (is_shifted(forms[0]) and not unlimited) or (is_shifted(forms[1]) and not whole):
        return []
    return list(_candidates(nodes, offsets, width, forms[0], forms[1], config))


def _entries(node: Node, heads: list[int]) -> Tensor:
    """Places of some heads' entries ``[U, D]`` in keys or values ``[batch, Hkv, length, D]``."""
    width = int(shape_of(node)[3])
    return torch.tensor(heads)[:, None] * width + torch.arange(width)


def _candidates(
    nodes: tuple[Node, ...], offsets: tuple[int, ...], width: int, key: Form, value: Form, config: CacheConfig
) -> Iterator[_Candidate]:
    """Keys and values in tensors of their own, then in one: values first, then what else the keys need."""
    keys, values = _columns(key), _columns(value)
    joined = list(dict.fromkeys([*values, *keys]))
    for joint, rows in ((False, keys), (True, joined)):
        stored = StoredHeads(nodes, offsets, width, torch.tensor(rows).T, torch.tensor(values).T, joint)
        pairs = list(zip(map(tuple, stored.key_places.tolist()), map(tuple, stored.value_places.tolist()), strict=True))
        kept = list(dict.fromkeys(pairs))
        group_of = [kept.index(pair) for pair in pairs]
        if len({group_of.count(g) for g in range(len(kept))}) > 1:
            kept, group_of = pairs, list(range(len(pairs)))
        entry = [1, 1]
        if config.dtype == "auto":
            entry = [stored.dtype(places).itemsize for places in (stored.key_places, stored.value_places)]
        size = len(kept) * (len(rows) * entry[0] + (0 if joint else len(values) * entry[1]))
        weighed = len(rows) if joint and len(kept) > 1 else len(values)
        first = tuple(group_of.index(g) for g in range(len(kept)))
        yield _Candidate(stored, key, value, first, tuple(group_of), size, len(rows) + weighed)


def _columns(form: Form) -> list[tuple[int, ...]]:
    """The columns that a form reads, each once: for every head its place in the token's row."""
    columns = [tuple(column) for places in row_places(form) for column in places.T.tolist()]
    return list(dict.fromkeys(columns))


def _reading(chosen: _Candidate, reads: list[int], classes: EntryClasses) -> Reading:
    """The choice, with query heads in the order of the stored heads."""
    heads = sorted(range(len(chosen.group_of)), key=lambda u: (chosen.group_of[u], u))
    order = tuple(sorted(range(len(reads)), key=lambda h: (heads.index(reads[h]), h)))
    places, kept = chosen.stored, list(chosen.kept)
    rows = [part[kept] for part in (places.key_places, places.value_places)]
    content, structure = (
        tuple(tuple(held[row].flatten().tolist()) for row in rows) for held in classes.with_structure(places.nodes)
    )
    stored = replace(places, key_places=rows[0], value_places=rows[1], content=content, structure=structure)
    forms = []
    for form, columns in ((chosen.key, places.key_places), (chosen.value, places.value_places)):
        at = {tuple(column): i for i, column in enumerate(columns.T.tolist())}
        forms.append(
            with_places(
                form,
                lambda p, at=at: torch.tensor([[at[tuple(column)] for column in p.T.tolist()]]),  # type: ignore[misc]
                lambda p: p[heads],
            )
        )
    absorption = Absorption(forms[0], forms[1], len(heads), places.key_places.shape[1])
    plain = all(
        isinstance(form, Row) and form.places.tolist() == [list(range(columns.shape[1]))]
        for form, columns in zip(forms, (places.key_places, places.value_places), strict=True)
    )
    return Reading(
        stored, None if order == tuple(range(len(order))) else order, None if plain and not places.joint else absorption
    )
