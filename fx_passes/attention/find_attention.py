"""``find-attention``: every spelling of attention becomes one ``kvpass::dense_attention``."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch.fx import Node

from kvpass.fx_passes.attention.read_scores import NotUnderstood
from kvpass.fx_passes.attention.rewrite_sdpa import rewrite_sdpa
from kvpass.fx_passes.attention.rewrite_softmax import key_side, rewrite_softmax
from kvpass.fx_passes.graph import CapturedGraph, PassResult, arguments, aten, is_call, refuse
from kvpass.fx_passes.shape_values import ShapeEvaluator, classify
from kvpass.fx_passes.token_axis.axes import Mixed, MixesTokens, is_free, is_score
from kvpass.fx_passes.token_axis.axis_rules import AXIS_RULES
from kvpass.fx_passes.token_axis.contraction import contraction_of
from kvpass.fx_passes.token_axis.find_positions import position_sources
from kvpass.fx_passes.token_axis.infer_axes import Blocked, Inference, infer_axes
from kvpass.types import Refusal


@dataclass(frozen=True)
class FindAttention:
    """Rewrite each attention to its canonical form.

    Before: ``scaled_dot_product_attention``, or a softmax of masked products of queries and keys, times values.
    After: ``kvpass::dense_attention(q [B, Hq, S, D], k [B, Hkv, S, D], v [B, Hkv, S, Dv], bias, scale, softcap,
        sinks)`` with the reshapes that bring the graph's own layout to this and back. Masks are part of the bias.
    Requires: ``canonicalize``.
    Refuses: scores that depend on the tokens in any other way than by ``q @ k^T``, and whatever has no reader.
    """

    name: str = "find-attention"

    def apply(self, captured: CapturedGraph) -> PassResult:
        """Rewrite one site after the other, in graph order."""
        kinds = classify(captured)
        evaluator = ShapeEvaluator(captured, kinds)
        inference = Inference(captured, kinds, position_sources(captured, kinds, evaluator), with_scores=True)
        infer_axes(inference, AXIS_RULES)
        refusals = self._broken_scores(captured, inference)
        found = 0
        for node in list(captured.graph.nodes):
            rewrite = self._rewriter(inference, node)
            if rewrite is None:
                continue
            try:
                with captured.graph.inserting_before(node):
                    replacement = rewrite(captured, inference, evaluator, node)
            except NotUnderstood as error:
                refusals.append(refuse(captured, error.node, error.reason, self.name))
                continue
            except (MixesTokens, Blocked) as error:
                refusals.append(refuse(captured, node, f"this attention {error}", self.name))
                continue
            inference.results[replacement] = inference.results[node]  # what comes next may read it at once
            inference.kinds[replacement] = inference.kinds[node]
            node.replace_all_uses_with(replacement)
            captured.graph.erase_node(node)  # torch tags sdpa as random, so that no clean-up would drop it
            found += 1
        captured.tidy()
        return PassResult(found, tuple(refusals))

    def _broken_scores(self, captured: CapturedGraph, inference: Inference) -> list[Refusal]:
        """Ops on scores that no rule can follow: without this the proof would only say that tokens are multiplied."""
        refusals: list[Refusal] = []
        for node, result in inference.results.items():
            if not isinstance(result, Mixed) or result.node is not node:
                continue
            inputs = [inference.results.get(n) for n in node.all_input_nodes]
            if any(isinstance(axes, tuple) and is_score(axes) for axes in inputs):
                refusals.append(refuse(captured, node, f"in an attention, {node.target} {result.reason}", self.name))
        return refusals

    def _rewriter(self, inference: Inference, node: Node) -> Callable[..., Node] | None:
        if isinstance(inference.results.get(node), Mixed):
            return None
        if is_call(node, aten.scaled_dot_product_attention):
            keys = inference.axes(arguments(node)["key"])
            return None if is_free(keys[-2]) else rewrite_sdpa  # constants, or a token's own heads: nothing to cache
        contraction = contraction_of(node)
        if contraction is not None and key_side(inference, contraction) is not None:
            return rewrite_softmax
        return None
