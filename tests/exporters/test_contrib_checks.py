"""A file with nodes of ONNX Runtime's own ops is held to the schemas of the installed wheel, and to its twin."""

import re
from collections.abc import Callable
from typing import Any

import pytest

from kvpass.exporters.checks.contrib_checks import check_contrib, check_twin
from kvpass.exporters.dialects.contrib_paged import TWIN_OP
from kvpass.exporters.dialects.onnx_paged import DOMAIN
from kvpass.exporters.writers.contrib_files import for_cuda

onnx = pytest.importorskip("onnx")
pytest.importorskip("onnxruntime")


def the_twin(**numbers: Any) -> Any:
    """A model of one node with a body, as far as the checks look at it."""
    helper, half, whole = onnx.helper, onnx.TensorProto.FLOAT16, onnx.TensorProto.INT32
    wide, cache = ("tokens", 16), ("blocks", 16, 2, 8)
    shapes: dict[str, tuple[int, Any]] = {"query": (half, ("tokens", 32)), "key": (half, wide), "value": (half, wide)}
    shapes |= {"key_cache": (half, cache), "value_cache": (half, cache)}
    shapes |= {name: (whole, ("n",)) for name in ("cumulative_sequence_length", "past_seqlens")}
    shapes |= {"block_table": (whole, ("n", "m")), "slot_mapping": (whole, ("tokens",))}
    inputs = [helper.make_tensor_value_info(f"{name}_0", kind, shape) for name, (kind, shape) in shapes.items()]
    names = ["out", "keys", "values"]
    outputs = [helper.make_tensor_value_info(name, half, None) for name in names]
    said = {"num_heads": 4, "kv_num_heads": 2, "scale": 0.5, "local_window_size": 7, **numbers}
    given = [value.name for value in inputs]
    node = helper.make_node(TWIN_OP, given, names, name="one", domain=DOMAIN, **said)
    body = [
        helper.make_node("Identity", [i], [o])
        for i, o in zip(("query", "key_cache", "value_cache"), names, strict=True)
    ]
    defaults = [helper.make_attribute(name, value) for name, value in said.items()]
    function = helper.make_function(
        DOMAIN, TWIN_OP, list(shapes), names, body, [helper.make_opsetid("", 23)], [], defaults
    )
    opsets = [helper.make_opsetid("", 23), helper.make_opsetid(DOMAIN, 1)]
    graph = helper.make_graph([node], "one", inputs, outputs)
    return helper.make_model(graph, opset_imports=opsets, functions=[function])


def copied(model: Any) -> Any:
    other = onnx.ModelProto()
    other.CopyFrom(model)
    return other


def set_number(node: Any, name: str, value: Any) -> None:
    kept = [attribute for attribute in node.attribute if attribute.name != name]
    del node.attribute[:]
    node.attribute.extend(kept if value is None else [*kept, onnx.helper.make_attribute(name, value)])


def exchange(node: Any) -> None:
    node.input[1], node.input[2] = node.input[2], node.input[1]


FILES: dict[str, tuple[Callable[[Any], Any], str]] = {
    "of another op": (
        lambda node: set_number(node, "sliding_window_cache", 1),
        "has the attribute sliding",
    ),
    "that is never said": (
        lambda node: set_number(node, "do_rotary", 1),
        "has the attribute do_rotary",
    ),
    "a number as text": (lambda node: set_number(node, "num_heads", "4"), "has num_heads as STRING"),
    "no scale": (lambda node: set_number(node, "scale", None), "lacks the attribute scale"),
    "a scale of 0": (lambda node: set_number(node, "scale", 0.0), "has a scale of 0"),
    "no slots": (lambda node: node.input.__setitem__(10, ""), "lacks the input slot_mapping"),
    "rotation": (lambda node: node.input.__setitem__(8, "query_0"), "has the input cos_cache"),
    "halves as numbers": (lambda node: node.input.__setitem__(7, "query_0"), r"gives block_table a tensor\(float16\)"),
    "an op that nobody has": (lambda node: setattr(node, "op_type", "PagedAttentions"), "onnxruntime lacks"),
    "an op that kvpass never says": (lambda node: setattr(node, "op_type", "Attention"), "kvpass never says"),
    "too few outputs": (lambda node: node.output.__delitem__(slice(1, 3)), "gives less than 2 outputs"),
}


@pytest.mark.parametrize("name", FILES)
def test_a_node_is_held_to_the_schema_of_the_wheel(name: str) -> None:
    change, words = FILES[name]
    model = for_cuda(the_twin())
    assert check_contrib(model) == []
    change(model.graph.node[0])
    assert any(re.search(words, complaint) for complaint in check_contrib(model))


TWINS: dict[str, tuple[Callable[[Any], Any], str]] = {
    "another window": (lambda node: set_number(node, "local_window_size", 8), "other attributes"),
    "keys and values exchanged": (exchange, "other inputs"),
    "another layout": (lambda node: set_number(node, "kv_cache_layout", "LATENT"), "other layout"),
    "another op": (lambda node: setattr(node, "op_type", "Identity"), "is another in its twin"),
}


@pytest.mark.parametrize("name", TWINS)
def test_the_model_is_held_to_its_twin(name: str) -> None:
    change, words = TWINS[name]
    twin = the_twin()
    model = for_cuda(copied(twin))
    assert check_twin(model, twin) == []
    change(model.graph.node[0])
    assert any(re.search(words, complaint) for complaint in check_twin(model, twin))
