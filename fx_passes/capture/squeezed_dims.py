"""``squeeze`` by name: a capture of several sequences says of each one which dims it drops."""

from __future__ import annotations

from torch.fx import Node

from kvpass.fx_passes.graph import CapturedGraph, arguments, aten, emit, is_call, shape_of


def name_squeezed_dims(captured: CapturedGraph) -> None:
    """Let each ``squeeze`` drop the dims that it dropped in the capture, by number.

    As it is written, it would drop the batch of one sequence and the length of one token as well; where that makes the
    model another function for them, model and graph are found to differ.
    """
    for node in [n for n in captured.graph.nodes if is_call(n, aten.squeeze)]:
        source = node.args[0]
        assert isinstance(source, Node)
        given = arguments(node).get("dim")
        dims = range(len(shape_of(source))) if given is None else given if isinstance(given, (list, tuple)) else [given]
        before = shape_of(source)
        dropped = {dim % len(before) for dim in dims if before and before[dim] == 1}
        with captured.graph.inserting_before(node):
            for dim in sorted(dropped, reverse=True):
                source = emit(captured, aten.squeeze.dim, source, dim, like=node)
        node.replace_all_uses_with(source)
        captured.graph.erase_node(node)
    captured.tidy()
