"""What TensorRT for RTX makes of a file: an engine without a GPU, and nothing of an attention left out in silence."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import kvpass
from kvpass.exporters.checks.tensorrt_checks import check_tensorrt
from kvpass.exporters.dialects.contracts import Port
from kvpass.exporters.manifest import MANIFEST_FILE
from kvpass.exporters.writers.onnx_file import MODEL_FILE
from kvpass.exporters.writers.tensorrt_engine import write_engine
from kvpass.models import zoo
from tests.decoders.catalogue import DECODERS

onnx = pytest.importorskip("onnx")
pytest.importorskip("tensorrt_rtx", reason="tensorrt-rtx is not installed")

CONTEXT, HEADS, DIM = 32, 4, 16
PORTS = [
    Port("query", torch.float16, ("batch", HEADS, "width", DIM), "queries"),
    Port("key", torch.float16, ("batch", HEADS, "width", DIM), "new keys"),
    Port("mask", torch.bool, ("batch", 1, "width", CONTEXT), "what is seen"),
    Port("past", torch.int64, ("batch",), "places in use"),
    Port("cache", torch.float16, ("batch", HEADS, CONTEXT, DIM), "keys, which are values too"),
]
OUTPUTS = [("out", ["batch", HEADS, "width", DIM]), ("cache_out", ["batch", HEADS, CONTEXT, DIM])]
TYPES = {torch.float16: "FLOAT16", torch.bool: "BOOL", torch.int64: "INT64"}


def write(folder: Path, change: Callable[[Any], None] = lambda model: None) -> dict[str, Any]:
    """A model of one write and one attention, changed; and the manifest of the one that was not."""
    helper, types = onnx.helper, onnx.TensorProto
    inputs = [helper.make_tensor_value_info(p.name, getattr(types, TYPES[p.dtype]), p.shape) for p in PORTS]
    outputs = [helper.make_tensor_value_info(name, types.FLOAT16, shape) for name, shape in OUTPUTS]
    nodes = [
        helper.make_node("TensorScatter", ["cache", "key", "past"], ["cache_out"], "write", axis=2, mode="linear"),
        helper.make_node(
            "Attention", ["query", "cache_out", "cache_out", "mask"], ["out"], "attend", scale=0.25, is_causal=0
        ),
    ]
    graph = helper.make_graph(nodes, "step", inputs, outputs)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 24)], ir_version=10)
    change(model)
    onnx.save(model, folder / MODEL_FILE)
    given = [{"name": port.name, "dtype": str(port.dtype).split(".")[1], "shape": list(port.shape)} for port in PORTS]
    gives = [{"name": name, "dtype": "float16", "shape": shape} for name, shape in OUTPUTS]
    return {"inputs": given, "outputs": gives}


def attention(model: Any) -> Any:
    return next(node for node in model.graph.node if node.op_type == "Attention")


def window_as_an_attribute(model: Any) -> None:
    model.opset_import[0].version = 25
    attention(model).attribute.append(onnx.helper.make_attribute("left_window_size", 7))


def lengths_instead_of_a_mask(model: Any) -> None:
    attention(model).input[3:] = ["", "", "", "past"]


def lengths_beside_the_mask(model: Any) -> None:
    attention(model).input.extend(["", "", "past"])


def softcap(model: Any) -> None:
    attention(model).attribute.append(onnx.helper.make_attribute("softcap", 20.0))


def written_at_the_start(model: Any) -> None:
    del model.graph.node[0].input[2]


def values_handed_back_unwritten(model: Any) -> None:
    model.graph.node[0].output[0] = "written"
    model.graph.node.append(onnx.helper.make_node("Identity", ["cache"], ["cache_out"]))


def another_shape(model: Any) -> None:
    model.graph.input[2].type.tensor_type.shape.dim[1].dim_value = HEADS


FAULTS: dict[str, tuple[Callable[[Any], None], str]] = {
    "a window as an attribute": (window_as_an_attribute, "left_window_size|does not take"),
    "lengths instead of a mask": (
        lengths_instead_of_a_mask,
        "inputs of node attend|reads the input mask|does not take",
    ),
    "lengths beside the mask": (lengths_beside_the_mask, "inputs of node attend|does not take"),
    "a softcap": (softcap, "softcap"),
    "written at the start": (written_at_the_start, "reads the input past|inputs of node write|does not take"),
    "a write without effect": (values_handed_back_unwritten, "is no output"),
    "another shape": (another_shape, "inputs of TensorRT's network are not"),
}


def test_the_parser_takes_all_of_it_and_an_engine_is_built(tmp_path: Path) -> None:
    manifest = write(tmp_path)
    assert check_tensorrt(tmp_path, manifest) == []
    write_engine(tmp_path, PORTS, CONTEXT)
    assert (tmp_path / "model.engine").stat().st_size > 10_000


@pytest.mark.parametrize("name", FAULTS)
def test_what_the_parser_leaves_out_is_found(name: str, tmp_path: Path) -> None:
    change, words = FAULTS[name]
    complaints = "; ".join(check_tensorrt(tmp_path, write(tmp_path, change)))
    assert complaints
    assert any(word in complaints for word in words.split("|")), complaints


@pytest.mark.slow
@pytest.mark.parametrize("name", ["window by distance, float mask", "latent by einsum, low-rank queries"])
def test_a_decoder_becomes_an_engine_and_its_model_is_right(name: str, tmp_path: Path) -> None:
    engine = kvpass.compile(DECODERS[name](6), kvpass.CacheConfig(block_size=8, num_blocks=1), verify=False)
    with engine:
        result = engine.export(tmp_path / "out", "tensorrt", context=96)
    assert result.audit is not None and result.audit.rows >= 20
    assert set(result.files) >= {"model.engine", "model.onnx", "run.py"}
    manifest = json.loads((tmp_path / "out" / MANIFEST_FILE).read_text())
    assert manifest["largest_batch"] == 8 and "tensorrt-rtx" in manifest["versions"]
    assert "deserialize_cuda_engine" in (tmp_path / "out" / "run.py").read_text()


@pytest.mark.slow
def test_latents_in_half_precision_are_nodes(tmp_path: Path) -> None:
    model, _ = zoo.tiny("deepseek_v3")
    config = kvpass.CacheConfig(block_size=16, num_blocks=1)
    with kvpass.compile(model.half(), config, verify=False) as engine:
        result = engine.export(tmp_path / "out", "tensorrt", context=96)
    assert result.audit is not None and result.audit.rows >= 20
    nodes = onnx.load(tmp_path / "out" / MODEL_FILE, load_external_data=False).graph.node
    attentions = [node for node in nodes if node.op_type == "Attention"]
    assert len(attentions) == 3  # one for each layer, and no single ops
