"""``read-masks``: what the mask and bias of each attention mean."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.fx import Node

from kvpass.fx_passes.attention.canonical_attention import attention_sites
from kvpass.fx_passes.graph import CapturedGraph, PassResult, arguments, aten, is_call, numbers_in, refuse, shape_of
from kvpass.fx_passes.masks.mask_meaning import read_mask_meaning
from kvpass.fx_passes.masks.mask_probe import NotProvenError
from kvpass.fx_passes.masks.prove_mask import MaskExpression, read_expression
from kvpass.fx_passes.shape_values import Dependence, ShapeEvaluator, classify, shape_evaluator
from kvpass.fx_passes.symbolic.extents import depends_on_extent_only
from kvpass.types import MaskMeaning, Refusal

MASK = "kvpass_mask"  # key of a site's MaskMeaning in its node's meta


@dataclass(frozen=True)
class ReadMasks:
    """Find the meaning of every bias by evaluating it.

    Before: ``kvpass::dense_attention`` with a bias that the graph computes from shapes.
    After: the same; each site carries its :class:`kvpass.types.MaskMeaning`.
    Requires: ``find-attention``.
    Refuses: no mask at all, a mask that shows later tokens (but for a constant prefix, the same in all attentions), one
        that differs between sequences or that changes with the length, one that depends on the tokens.

    Attributes:
        max_length: length that a bias table has to cover; None for the default.
    """

    max_length: int | None = None
    name: str = "read-masks"

    def apply(self, captured: CapturedGraph) -> PassResult:
        """Read each distinct bias once."""
        kinds, evaluator = captured.analysis(classify), captured.analysis(shape_evaluator)
        known: dict[tuple[object, ...], MaskMeaning | str] = {}
        refusals: list[Refusal] = []
        for site in attention_sites(captured):
            named = arguments(site)
            heads = int(shape_of(named["query"])[1])
            key = (*self._origin(named["bias"]), heads, named["sinks"] is not None)
            if key not in known:
                known[key] = self._read(captured, kinds, evaluator, site, heads)
            meaning = known[key]
            if isinstance(meaning, str):
                refusals.append(refuse(captured, site, meaning, self.name))
            else:
                site.meta[MASK] = meaning
        return PassResult(0, tuple(refusals or self._refuse_prefixes(captured)))

    def _refuse_prefixes(self, captured: CapturedGraph) -> list[Refusal]:
        """A step shows all attentions the same prefix."""
        sites = attention_sites(captured)
        prefixes = {site.meta[MASK].prefix for site in sites}
        if len(prefixes) <= 1:
            return []
        named = " and ".join(str(prefix or 0) for prefix in sorted(prefixes, key=lambda prefix: prefix or 0))
        reason = f"the attentions of this model have prefixes of {named} tokens that see one another: not the same"
        return [refuse(captured, site, reason, self.name) for site in sites if site.meta[MASK].prefix is not None]

    def _origin(self, bias: Node | None) -> tuple[object, ...]:
        """What a bias is made of: equal for the sites of one mask, though each has nodes of its own."""
        if bias is None or bias.op != "call_function":
            return (bias,)
        inner = tuple(self._origin(a) if isinstance(a, Node) else repr(a) for a in bias.args)
        simple = is_call(
            bias, aten.where, aten._to_copy, aten.expand, aten.reshape, aten.add, aten.logical_not, aten.full
        )
        return (bias.target, *inner, repr(sorted(bias.kwargs.items(), key=str))) if simple else (bias,)

    def _read(
        self,
        captured: CapturedGraph,
        kinds: dict[Node, Dependence],
        evaluator: ShapeEvaluator,
        site: Node,
        heads: int,
    ) -> MaskMeaning | str:
        named = arguments(site)
        bias = named["bias"]
        if bias is None:
            return "this attention has no mask: every token sees those that come later (not causal)"
        if kinds[bias] is Dependence.DATA:
            return "the mask or bias of this attention depends on token values (data)"
        return read_mask_meaning(
            _bias_function(evaluator, bias),
            thresholds=numbers_in(evaluator.needed(bias), captured),
            absolute_scores=named["sinks"] is not None,
            num_heads=heads,
            max_length=self.max_length or captured.max_length,
            acts=depends_on_extent_only(evaluator, bias),
            expression=_expression(captured, evaluator, bias, heads),
        )


def _expression(captured: CapturedGraph, evaluator: ShapeEvaluator, bias: Node, heads: int) -> MaskExpression | None:
    """The bias as an expression; None where its graph cannot be read, so that its meaning rests on values alone."""
    try:
        with evaluator.deciding("the mask"):
            return read_expression(captured, evaluator, bias, heads)
    except Exception:  # the graph is the user's, and torch may raise anything where it is computed piece by piece
        return None


def _bias_function(evaluator: ShapeEvaluator, bias: Node) -> Callable[[int, int], Tensor]:
    def evaluate(batch: int, length: int) -> Tensor:
        with evaluator.deciding("the mask"):
            value = evaluator.evaluate(bias, batch, length)
        expected = [evaluator.number(s, batch, length) for s in bias.meta["val"].shape]
        if list(value.shape) != expected:
            raise ValueError(f"the mask has shape {list(value.shape)} instead of {expected}")
        if torch.isnan(value).any():
            raise NotProvenError(
                "the bias is NaN somewhere: either the model's own is, or scores are multiplied with a mask, which "
                "hides nothing from a softmax, or with numbers too small or negative after their mask"
            )
        return value

    return evaluate
