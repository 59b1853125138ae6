"""What TensorRT's parser made of an ONNX file: that nothing of what decides an attention was left out on the way."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from kvpass.errors import VerificationError
from kvpass.exporters.writers.onnx_file import MODEL_FILE
from kvpass.exporters.writers.tensorrt_engine import parse

# Attributes of which the parser is known to make what they say; with any other a node is not trusted.
HONOURED = {"Attention": {"scale", "is_causal"}, "TensorScatter": {"axis", "mode"}}
BECOMES = {"Attention": "ATTENTION_INPUT", "TensorScatter": "KV_CACHE_UPDATE"}
DTYPES = {"int64": "INT64", "float32": "FLOAT", "float16": "HALF", "bfloat16": "BF16", "bool": "BOOL"}


def check_tensorrt(folder: Path, manifest: Mapping[str, Any]) -> list[str]:
    """Complaints about the network that the parser makes of the file in a folder."""
    import onnx

    try:
        parsed = parse(folder)
    except VerificationError as error:
        return [str(error)]
    model = onnx.load(folder / MODEL_FILE, load_external_data=False)
    return [*_ports(parsed.network, manifest), *_unread(parsed.network), *_nodes(model, parsed.network)]


def _ports(network: Any, manifest: Mapping[str, Any]) -> Iterator[str]:
    for kind, count, get in (
        ("inputs", network.num_inputs, network.get_input),
        ("outputs", network.num_outputs, network.get_output),
    ):
        there = [(tensor.name, _dtype(tensor), list(tensor.shape)) for tensor in map(get, range(count))]
        said = [
            (port["name"], DTYPES[port["dtype"]], [-1 if isinstance(size, str) else size for size in port["shape"]])
            for port in manifest[kind]
        ]
        if there != said:
            yield f"the {kind} of TensorRT's network are not those of the manifest: {there} instead of {said}"


def _unread(network: Any) -> Iterator[str]:
    read = {tensor.name for layer in _layers(network) for tensor in _inputs(layer) if tensor is not None}
    for number in range(network.num_inputs):
        name = network.get_input(number).name
        if name not in read:
            yield f"nothing in TensorRT's network reads the input {name}"


def _nodes(model: Any, network: Any) -> Iterator[str]:
    """Every attention and every write is there, with all its inputs, with its mask, and handing its cache back."""
    given_back = {network.get_output(number).name for number in range(network.num_outputs)}
    for op, kind in BECOMES.items():
        nodes = [node for node in model.graph.node if node.op_type == op and not node.domain]
        layers = [layer for layer in _layers(network) if layer.type.name == kind]
        if len(nodes) != len(layers):
            yield f"of {len(nodes)} nodes {op} TensorRT's network has {len(layers)}"
            continue
        for node, layer in zip(nodes, layers, strict=True):
            unknown = {attribute.name for attribute in node.attribute} - HONOURED[op]
            if unknown:
                yield f"TensorRT's parser is not known to honour {', '.join(sorted(unknown))} of node {node.name}"
            given, taken = sum(map(bool, node.input)), [tensor for tensor in _inputs(layer) if tensor is not None]
            if given != len(taken):
                yield f"of {given} inputs of node {node.name} TensorRT's network reads {len(taken)}"
            elif op == "TensorScatter" and layer.get_output(0).name not in given_back:
                yield f"the cache that node {node.name} writes is no output of TensorRT's network"
            elif op == "Attention" and (_dtype(taken[3]) != "BOOL" or len(taken[3].shape) != 4):
                yield f"the mask of node {node.name} is not bool with four dims in TensorRT's network"


def _layers(network: Any) -> Iterator[Any]:
    return map(network.get_layer, range(network.num_layers))


def _inputs(layer: Any) -> list[Any]:
    return [layer.get_input(number) for number in range(layer.num_inputs)]


def _dtype(tensor: Any) -> str:
    return str(tensor.dtype.name)
