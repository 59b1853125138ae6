"""A traced step as an ONNX model: standard ops, bodies for nodes of ``ai.kvpass``, names and sizes of the contract."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch.export import Dim, ExportedProgram, export

from kvpass.exporters.dialects.contracts import Port
from kvpass.exporters.dialects.onnx_paged import DOMAIN, Bodies, Body
from kvpass.fx_passes.capture.alone import alone
from kvpass.fx_passes.capture.quiet_export import quiet_export

MODEL_FILE, WEIGHTS_FILE = "model.onnx", "model.onnx.data"
TRANSLATED_OPSET = 23  # the newest that torch translates to
EXTERNAL_BYTES = 1024  # tensors from this size on lie in the file of weights


def onnx_model(program: ExportedProgram, inputs: Sequence[Port], outputs: Sequence[Port], opset: int) -> Any:
    """The model of a program as ``onnx_ir`` has it, which refers to the program's tensors and copies none."""
    model = _translate(program)
    _name(model.graph.inputs, inputs)
    _name(model.graph.outputs, outputs)
    model.opset_imports[""] = opset
    model.producer_name = "kvpass"
    return model


def add_bodies(model: Any, bodies: Bodies) -> None:
    """Give each op of ``ai.kvpass`` its function."""
    for signature, name in bodies.names.items():
        function = _function(bodies.body(signature), name, model.opset_imports[""])
        model.functions[function.identifier()] = function
    if bodies.names:
        model.opset_imports[DOMAIN] = 1


def save(model: Any, folder: Path) -> None:
    """Write the model, and its weights once beside it; tensors that are shared stay shared."""
    import onnx_ir

    onnx_ir.save(model, folder / MODEL_FILE, external_data=WEIGHTS_FILE, size_threshold_bytes=EXTERNAL_BYTES)


@contextmanager
def _without_advice() -> Iterator[None]:
    """Nothing of what torch's translator logs on its way, such as which packages it would also translate."""
    loggers = [logging.getLogger(name) for name in ("torch.onnx", "onnx_ir", "onnxscript")]
    before = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        for logger, level in zip(loggers, before, strict=True):
            logger.setLevel(level)


@alone()
def _translate(program: ExportedProgram) -> Any:
    with quiet_export(), _without_advice(), torch.no_grad():
        done = torch.onnx.export(program, dynamo=True, opset_version=TRANSLATED_OPSET, verbose=False)
    assert done is not None
    _forget_where_it_was_made(done.model.graph)
    return done.model


def _forget_where_it_was_made(graph: Any) -> None:
    """Take out what a translator notes beside nodes: lines of source with the paths of this machine."""
    graph.metadata_props.clear()
    for node in graph.all_nodes():
        node.metadata_props.clear()


def _name(values: Sequence[Any], ports: Sequence[Port]) -> None:
    import onnx_ir

    for value, port in zip(values, ports, strict=True):
        value.name, value.shape = port.name, onnx_ir.Shape(port.shape)


def _function(body: Body, name: str, opset: int) -> Any:
    import onnx_ir

    signature = body.signature
    graph = _translate(_trace(body)).graph
    for number, (value, given) in enumerate(zip(graph.inputs, signature.names, strict=True)):
        value.name = given or f"input_{number}"
    for value in list(graph.initializers.values()):
        constant = onnx_ir.Node("", "Constant", [], [onnx_ir.AttrTensor("value", value.const_value)])
        constant.outputs[0].name = value.name
        graph.insert_before(graph[0], constant)
        value.replace_all_uses_with(constant.outputs[0])
    graph.initializers.clear()
    graph.opset_imports[""] = opset
    # The numbers are part of the body; that they are attributes as well is for runtimes with kernels of their own.
    attributes = [onnx_ir.Attr(key, _kind(value), value) for key, value in signature.attributes.items()]
    return onnx_ir.Function(DOMAIN, name, graph=graph, attributes=attributes)


def _kind(value: float | int | str) -> Any:
    import onnx_ir

    kinds = {int: onnx_ir.AttributeType.INT, float: onnx_ir.AttributeType.FLOAT, str: onnx_ir.AttributeType.STRING}
    return kinds[type(value)]


@alone()
def _trace(body: Body) -> ExportedProgram:
    dims = {name: Dim(name, min=1) for name in ("tokens", "sequences", "columns", "blocks")}
    dims["starts"] = dims["sequences"] + 1
    inputs = body.signature.inputs
    shapes = tuple({i: dims[s] for i, s in enumerate(shape) if isinstance(s, str)} for _, shape in inputs)
    with torch.no_grad(), quiet_export():
        return export(body, tuple(body.examples()), dynamic_shapes=(shapes,), strict=False)
