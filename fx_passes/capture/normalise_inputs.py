"""``normalise-inputs``: whatever front captured a graph, its inputs are token ids and positions alone."""

from __future__ import annotations

from dataclasses import dataclass

from torch.fx import Node

from kvpass.fx_passes.graph import CapturedGraph, PassResult, Role, aten, emit, expression, refuse, role_of


@dataclass(frozen=True)
class NormaliseInputs:
    """Take in the inputs that are no tokens.

    Before: placeholders with roles, as a front hands them over: sizes and padding masks among them.
    After: sizes are read off the token ids; a mask of ones is ones. Token ids and positions are left.
    Requires: that parameters are ``get_attr`` nodes already: the front knows the tensors behind them.
    Refuses: data that each token brings along, and parameters that are inputs: no step carries them.
    """

    name: str = "normalise-inputs"

    def apply(self, captured: CapturedGraph) -> PassResult:
        """Replace each by what it is."""
        rewritten, refusals = 0, []
        for node in [node for node in captured.graph.nodes if node.op == "placeholder"]:
            role = role_of(node)
            if role in (Role.PER_TOKEN_DATA, Role.PARAMETER):
                refusals.append(refuse(captured, node, f"the model takes {role.value}: no step carries it", self.name))
            elif role in (Role.SIZE, Role.MASK_OF_ONES) and node.users:
                self._replace(captured, node)
                rewritten += 1
            if role in (Role.SIZE, Role.MASK_OF_ONES):
                captured.graph.erase_node(node)
        return PassResult(rewritten, tuple(refusals))

    def _replace(self, captured: CapturedGraph, node: Node) -> None:
        if role_of(node) is Role.SIZE:
            which = {captured.batch: "batch", captured.length: "length"}[expression(node)]
            replacement = captured.size(which)
        else:
            first = next(n for n in captured.graph.nodes if n.op not in ("placeholder", "get_attr"))
            with captured.graph.inserting_before(first):
                replacement = emit(captured, aten.ones_like.default, captured.input_ids, dtype=node.meta["val"].dtype)
        node.replace_all_uses_with(replacement)
