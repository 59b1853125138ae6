"""``assume-no-padding``: comparisons with the padding token are decided, for sequences that have none."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch.fx import Node

from kvpass.fx_passes.graph import CapturedGraph, PassResult, arguments, aten, emit, is_call
from kvpass.fx_passes.shape_values import Dependence, ShapeEvaluator, classify
from kvpass.fx_passes.token_axis.axes import Mixed, is_score
from kvpass.fx_passes.token_axis.axis_rules import AXIS_RULES
from kvpass.fx_passes.token_axis.find_positions import position_sources
from kvpass.fx_passes.token_axis.infer_axes import Inference, infer_axes


@dataclass(frozen=True)
class AssumeNoPadding:
    """Decide the comparisons of token ids with the padding token, where tokens are mixed by them.

    Padding has no place in a sequence of its own: prompts are ragged and are never padded. A model that counts
    positions by ``cumsum(ids != pad)``, or that hides padded keys, does what it does without padding in every sequence
    that holds no such token. That is the condition of the rewrite, left in ``captured.forbidden_tokens``: whoever feeds
    the rewritten graph has to keep those ids out.

    Before: ``ids != pad`` of the model's token ids, where the model itself says that ``pad`` is padding: it looks the
        ids up with ``embedding(..., padding_idx=pad)``.
    After: a tensor of ones (or of zeros, for ``ids == pad``).
    Requires: ``canonicalize``.
    Refuses: nothing. A comparison with any other token stays, and so does one that treats tokens one by one: that is
        exact for all token ids.
    """

    name: str = "assume-no-padding"

    def apply(self, captured: CapturedGraph) -> PassResult:
        """Rewrite the comparisons of each padding token, if one of them mixes tokens."""
        rewritten = 0
        for token in sorted(padding_tokens(captured)):
            found = {n: verdict for n in captured.graph.nodes if (verdict := _verdict(captured, n, token)) is not None}
            if not found or not _mixes_tokens(captured, set(found)):
                continue
            for node, verdict in found.items():
                like = aten.ones_like if verdict else aten.zeros_like
                with captured.graph.inserting_before(node):
                    decided = emit(captured, like.default, captured.input_ids, dtype=torch.bool, like=node)
                node.replace_all_uses_with(decided)
            captured.forbidden_tokens |= {token}
            rewritten += len(found)
        if rewritten:
            captured.tidy()
        return PassResult(rewritten)


def padding_tokens(captured: CapturedGraph) -> set[int]:
    """The ids that the model looks up as padding."""
    found = set()
    for user in captured.input_ids.users:
        if is_call(user, aten.embedding) and arguments(user)["indices"] is captured.input_ids:
            found.add(int(arguments(user)["padding_idx"]))
    return {token for token in found if token >= 0}


Compare = Callable[[int, float], bool | None]  # (padding token, other operand) -> what it says of every other token

# Token ids are 0 or more: a comparison says one thing of all ids but the padding token where it divides them like this.
COMPARISONS: dict[Any, Compare] = {
    aten.ne: lambda pad, other: True if other == pad else None,
    aten.eq: lambda pad, other: False if other == pad else None,
    aten.gt: lambda pad, other: True if pad == 0 == other else None,
    aten.ge: lambda pad, other: True if pad == 0 and other == 1 else None,
    aten.le: lambda pad, other: False if pad == 0 == other else None,
    aten.lt: lambda pad, other: False if pad == 0 and other == 1 else None,
}


def _verdict(captured: CapturedGraph, node: Node, token: int) -> bool | None:
    """What a comparison of the token ids says of every token but ``token``; None where it is no such comparison."""
    if is_call(node, aten._to_copy) and node.args[0] is captured.input_ids:
        return True if token == 0 and node.meta["val"].dtype is torch.bool else None
    compare = COMPARISONS.get(getattr(node.target, "overloadpacket", None))
    if compare is None or node.args[0] is not captured.input_ids:
        return None
    other = node.args[1]
    return compare(token, other) if isinstance(other, (int, float)) and not isinstance(other, bool) else None


def _mixes_tokens(captured: CapturedGraph, comparisons: set[Node]) -> bool:
    """Whether what follows from the comparisons alone is worked on along the tokens, or meets scores."""
    kinds = classify(captured)
    evaluator = ShapeEvaluator(captured, kinds)
    inference = Inference(captured, kinds, position_sources(captured, kinds, evaluator), with_scores=True)
    infer_axes(inference, AXIS_RULES)
    derived = _derived(captured, kinds, comparisons)
    for node in captured.graph.nodes:
        if not derived & set(node.all_input_nodes):
            continue
        axes = inference.results.get(node)
        if isinstance(axes, Mixed) or (isinstance(axes, tuple) and is_score(axes)):
            return True
        if is_call(node, aten.scaled_dot_product_attention):
            return True
    return False


def _derived(captured: CapturedGraph, kinds: dict[Node, Dependence], comparisons: set[Node]) -> set[Node]:
    """Nodes that depend on the tokens by the comparisons alone."""
    derived = set(comparisons)
    for node in captured.graph.nodes:
        data = [n for n in node.all_input_nodes if kinds[n] is Dependence.DATA]
        if data and node.op != "output" and all(n in derived for n in data):
            derived.add(node)
    return derived
