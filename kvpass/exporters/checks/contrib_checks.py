"""What is looked at in nodes of ``com.microsoft``: that the installed ONNX Runtime has them as they stand in the file.

An op of this domain is whatever a wheel says it is: its schema is asked, and of what the schema has only that is let
through which kvpass is known to say, so that nothing rests on a default or on an attribute that nobody has tried.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kvpass.exporters.writers.contrib_files import TWIN_FILE
from kvpass.exporters.writers.onnx_file import MODEL_FILE

DOMAIN = "com.microsoft"


@dataclass(frozen=True)
class Said:
    """What kvpass says of an op.

    Attributes:
        inputs: those that a node must have.
        may_have: those that it may have.
        attributes: those that it must have.
        may_say: those that it may have.
        outputs: least number of outputs.
    """

    inputs: frozenset[str]
    may_have: frozenset[str]
    attributes: frozenset[str]
    may_say: frozenset[str]
    outputs: int


def words(text: str) -> frozenset[str]:
    """The names in a text."""
    return frozenset(text.split())


SAID = {
    "GroupQueryAttention": Said(
        words("query key value past_key past_value seqlens_k total_sequence_length query_seqlens"),
        words("attention_bias head_sink"),
        words("num_heads kv_num_heads scale"),
        words("softcap local_window_size"),
        3,
    ),
    "PagedAttention": Said(
        words("query key key_cache cumulative_sequence_length past_seqlens block_table slot_mapping"),
        words("value value_cache head_sink"),
        words("num_heads kv_num_heads scale"),
        words("softcap local_window_size kv_cache_layout v_head_size"),
        2,
    ),
}


def check_contrib_nodes(folder: Path, manifest: Mapping[str, Any]) -> list[str]:
    """Complaints about the nodes of ``com.microsoft`` in the file in a folder, which has to have some."""
    import onnx

    model = onnx.load(folder / MODEL_FILE, load_external_data=False)
    if not any(node.domain == DOMAIN for node in model.graph.node):
        return [f"{MODEL_FILE} has no node of {DOMAIN}"]
    return check_contrib(model)


def check_contrib_twin(folder: Path, manifest: Mapping[str, Any]) -> list[str]:
    """Complaints about the twin in a folder: that it is no valid model, or another than the file beside it."""
    import onnx

    try:
        onnx.checker.check_model(str(folder / TWIN_FILE))
        model, twin = (onnx.load(folder / name, load_external_data=False) for name in (MODEL_FILE, TWIN_FILE))
    except Exception as error:  # the checker and protobuf raise classes of their own
        return [f"{TWIN_FILE} is no valid model: {' '.join(str(error).split())[:300]}"]
    return check_twin(model, twin)


def check_contrib(model: Any) -> list[str]:
    """Complaints about the nodes of ``com.microsoft`` in a model, ``[]`` where it has none."""
    nodes = [node for node in model.graph.node if node.domain == DOMAIN]
    if not nodes:
        return []
    schemas, types = schemas_of_wheel(), _types(model.graph)
    return [complaint for node in nodes for complaint in check_node(node, schemas.get(node.op_type), types)]


def schemas_of_wheel() -> dict[str, Any]:
    """The schemas of the domain in the installed ONNX Runtime, by op."""
    from onnxruntime.capi.onnxruntime_pybind11_state import get_all_operator_schema

    return {schema.name: schema for schema in get_all_operator_schema() if schema.domain == DOMAIN}


def check_node(node: Any, schema: Any, types: Mapping[str, str]) -> list[str]:
    """Complaints about one node.

    Args:
        node: of ``com.microsoft``.
        schema: of its op; None where the wheel has none.
        types: of values by their names, as schemas write them, such as ``tensor(float16)``.
    """
    where, said = f"node {node.name} of {node.op_type}", SAID.get(node.op_type)
    if schema is None or said is None:
        who = "the installed onnxruntime lacks" if schema is None else "kvpass never says"
        return [f"{where} is of an op that {who}"]
    found = _names(node, schema, said)
    allowed = {constraint.type_param_str: set(constraint.allowed_type_strs) for constraint in schema.type_constraints}
    bound: dict[str, str] = {}
    pairs = [*zip(schema.inputs, node.input, strict=False), *zip(schema.outputs, node.output, strict=False)]
    for formal, name in pairs:
        given = types.get(name)
        if not name or given is None:
            continue
        if given not in allowed.get(formal.typeStr, {formal.typeStr}):
            found.append(f"gives {formal.name} a {given}")
        if formal.typeStr in allowed and bound.setdefault(formal.typeStr, given) != given:
            found.append(f"has a {given} as {formal.name} and a {bound[formal.typeStr]} beside it")
    return [f"{where} {complaint}, which its schema does not allow" for complaint in found]


def _names(node: Any, schema: Any, said: Said) -> list[str]:
    from onnx import AttributeProto, helper

    formal, found = [parameter.name for parameter in schema.inputs], []
    if len(node.input) > len(formal) or len(node.output) > len(schema.outputs):
        found.append(f"has {len(node.input)} inputs and {len(node.output)} outputs")
    inputs = {name for name, given in zip(formal, node.input, strict=False) if given}
    attributes = {attribute.name: attribute for attribute in node.attribute}
    for kind, there, needed, more in (
        ("input", inputs, said.inputs, said.may_have),
        ("attribute", attributes.keys(), said.attributes, said.may_say),
    ):
        found += [f"lacks the {kind} {name}" for name in sorted(needed - there)]
        found += [f"has the {kind} {name}" for name in sorted(there - needed - more)]
    if sum(bool(name) for name in node.output) < said.outputs:
        found.append(f"gives less than {said.outputs} outputs")
    for name, attribute in attributes.items():
        kind = AttributeProto.AttributeType.Name(attribute.type)
        if name not in schema.attributes or schema.attributes[name].type.name != kind:
            found.append(f"has {name} as {kind}")
        elif name in ("scale", "softcap") and not helper.get_attribute_value(attribute):
            found.append(f"has a {name} of 0")  # the kernels take it for none
    return found


def _types(graph: Any) -> dict[str, str]:
    values = [*graph.input, *graph.value_info, *graph.output]
    found = {value.name: _type_name(value.type.tensor_type.elem_type) for value in values}
    return found | {tensor.name: _type_name(tensor.data_type) for tensor in graph.initializer}


def _type_name(number: int) -> str:
    from onnx import TensorProto

    return f"tensor({TensorProto.DataType.Name(number).lower()})"


def check_twin(model: Any, twin: Any) -> list[str]:
    """Complaints about the twin of a model: it has to be the same but for the nodes of PagedAttention."""
    from onnx import helper

    schemas, functions = schemas_of_wheel(), {function.name: function for function in twin.functions}
    found = []
    for kind in ("input", "output", "initializer"):
        if list(getattr(model.graph, kind)) != list(getattr(twin.graph, kind)):
            found.append(f"its twin has another {kind}")
    if len(model.graph.node) != len(twin.graph.node):
        return [*found, "its twin has other nodes"]

    def numbers(attributes: Any) -> dict[str, Any]:
        return {a.name: helper.get_attribute_value(a) for a in attributes if a.name != "kv_cache_layout"}

    for node, other in zip(model.graph.node, twin.graph.node, strict=True):
        if node == other:
            continue
        body, schema = functions.get(other.op_type), schemas.get(node.op_type)
        if node.domain != DOMAIN or node.op_type != "PagedAttention" or body is None or schema is None:
            found.append(f"node {node.name} is another in its twin")
            continue
        given = {formal.name: name for formal, name in zip(schema.inputs, node.input, strict=False) if name}
        pairs = [
            ("inputs", given, dict(zip(body.input, other.input, strict=False))),
            ("outputs", list(node.output), list(other.output)),
            ("attributes", numbers(node.attribute), numbers(other.attribute)),
            ("numbers", numbers(other.attribute), numbers(body.attribute_proto)),
            ("layout", _is_latent(node), "value_cache" not in given),
        ]
        found += [f"node {node.name} has other {kind} than its twin" for kind, ours, its in pairs if ours != its]
    return found


def _is_latent(node: Any) -> bool:
    return any(attribute.name == "kv_cache_layout" and attribute.s == b"LATENT" for attribute in node.attribute)
