"""Masks written as functions of batch and length, traced without torch.export: a graph in a tenth of a second."""

from collections.abc import Callable

import torch
from torch import Tensor
from torch.fx.experimental.proxy_tensor import make_fx

from kvpass.fx_passes.graph import ROLE, CapturedGraph, Role, expression, numbers_in
from kvpass.fx_passes.masks.mask_meaning import read_mask_meaning
from kvpass.fx_passes.masks.prove_mask import MaskExpression, read_expression
from kvpass.fx_passes.shape_values import ShapeEvaluator, classify
from kvpass.fx_passes.symbolic.extents import depends_on_extent_only
from kvpass.types import MaskMeaning

Mask = Callable[[int, int], Tensor]


class TracedMask:
    """The graph of a mask, and what the passes know of it.

    Attributes:
        captured: a graph that takes token ids and returns the bias.
        bias: node of the bias, additive.
    """

    def __init__(self, mask: Mask) -> None:
        def forward(ids: Tensor) -> Tensor:
            found = mask(ids.shape[0], ids.shape[1])
            return torch.where(found, 0.0, -torch.inf) if found.dtype == torch.bool else found + 0.0

        module = make_fx(forward, tracing_mode="symbolic", _allow_non_fake_inputs=True)(torch.zeros(2, 11).long())
        (ids,) = module.graph.find_nodes(op="placeholder")
        fake = ids.meta["val"].fake_mode
        for node in module.graph.find_nodes(op="get_attr"):
            node.meta["val"] = fake.from_tensor(getattr(module, str(node.target)), static_shapes=True)
        ids.meta[ROLE] = Role.TOKENS
        batch, length = (expression(size) for size in ids.meta["val"].shape)
        self.captured = CapturedGraph(module, batch, length, {Role.TOKENS: ids})
        (self.bias,) = next(n for n in module.graph.nodes if n.op == "output").all_input_nodes
        self.evaluator = ShapeEvaluator(self.captured, classify(self.captured))

    def expression(self, num_heads: int = 1) -> MaskExpression:
        """The bias as an expression; raises UnreadableError."""
        return read_expression(self.captured, self.evaluator, self.bias, num_heads)

    def evaluate(self, batch: int, length: int) -> Tensor:
        """The bias at a batch size and length."""
        return self.evaluator.evaluate(self.bias, batch, length)

    def meaning(
        self, num_heads: int = 1, *, sinks: bool = False, max_length: int | None = None, read: bool = True
    ) -> MaskMeaning | str:
        """What read-masks makes of it; without `read` from values alone."""
        return read_mask_meaning(
            self.evaluate,
            thresholds=numbers_in(self.evaluator.needed(self.bias), self.captured),
            absolute_scores=sinks,
            num_heads=num_heads,
            max_length=max_length,
            acts=depends_on_extent_only(self.evaluator, self.bias),
            expression=self.expression(num_heads) if read else None,
        )
