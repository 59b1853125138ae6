"""What is looked at in an ONNX file before it is run: that it is valid, and that nothing of it is without effect."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from kvpass.exporters.writers.onnx_file import MODEL_FILE

# Attributes that runtimes are known to leave out without a word, or whose meaning has moved: none may be written.
UNSAFE = {
    "Attention": {"is_causal", "softcap", "left_window_size", "right_window_size"},
    "TensorScatter": set(),
}


def check_onnx(folder: Path, manifest: Mapping[str, Any]) -> list[str]:
    """Complaints about the file in a folder, whose manifest says what it should be."""
    import onnx

    try:
        onnx.checker.check_model(str(folder / MODEL_FILE))
        model = onnx.load(folder / MODEL_FILE, load_external_data=False)
        return [*_ports(model, manifest), *_unread(model), *_attributes(model)]
    except Exception as error:  # the checker and protobuf raise classes of their own
        return [f"{MODEL_FILE} is no valid model: {' '.join(str(error).split())[:300]}"]


def _ports(model: Any, manifest: Mapping[str, Any]) -> list[str]:
    found = []
    for kind, values in (("inputs", model.graph.input), ("outputs", model.graph.output)):
        there = [(value.name, _shape(value)) for value in values]
        said = [(port["name"], port["shape"]) for port in manifest[kind]]
        if there != said:
            found.append(f"its {kind} are not those of the manifest: {there} instead of {said}")
    return found


def _shape(value: Any) -> list[int | str]:
    return [dim.dim_param or dim.dim_value for dim in value.type.tensor_type.shape.dim]


def _unread(model: Any) -> list[str]:
    read = {name for node in model.graph.node for name in node.input}
    return [f"nothing reads the input {value.name}" for value in model.graph.input if value.name not in read]


def _attributes(model: Any) -> list[str]:
    found = []
    for node in model.graph.node:
        unsafe = UNSAFE.get(node.op_type, set()) if not node.domain else set()
        for attribute in node.attribute:
            if attribute.name in unsafe and (attribute.i or attribute.f):
                found.append(f"node {node.name} leaves to {attribute.name} what the mask has to say")
        if node.op_type == "Attention" and not node.domain and (len(node.input) < 4 or not node.input[3]):
            found.append(f"node {node.name} has no mask")
    return found
