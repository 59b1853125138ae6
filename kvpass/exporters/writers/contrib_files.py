"""The two files of ``ort-contrib-paged``: the model for the CUDA provider, and its twin for all others.

They are one graph and one file of weights. Where the twin has a node of ``ai.kvpass`` with a body, the model has
``com.microsoft::PagedAttention``, whose inputs go by their places in the schema.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from kvpass.exporters.dialects.contrib_paged import TWIN_OP
from kvpass.exporters.dialects.contrib_rows import CONTRIB_DOMAIN
from kvpass.exporters.dialects.onnx_paged import DOMAIN
from kvpass.exporters.writers.onnx_file import MODEL_FILE

TWIN_FILE = "twin.onnx"
OP = "PagedAttention"
# By their places in the schema; rotation and norms are the model's own ops, and stand for places here.
INPUTS = (
    "query", "key", "value", "key_cache", "value_cache", "cumulative_sequence_length", "past_seqlens", "block_table",
    "cos_cache", "sin_cache", "slot_mapping", "head_sink",
)  # fmt: skip


def split_twin(folder: Path) -> None:
    """Name the model in a folder, whose nodes have bodies, the twin, and write that for the CUDA provider."""
    import onnx

    model = onnx.load(folder / MODEL_FILE, load_external_data=False)
    (folder / MODEL_FILE).rename(folder / TWIN_FILE)
    onnx.save(for_cuda(model), folder / MODEL_FILE)


def for_cuda(twin: Any) -> Any:
    """The model of a twin, made of it in place."""
    from onnx import helper

    names = {function.name: list(function.input) for function in twin.functions if function.domain == DOMAIN}
    for node in twin.graph.node:
        if node.domain == DOMAIN and node.op_type.startswith(TWIN_OP):
            given = dict(zip(names[node.op_type], node.input, strict=True))
            last = max(INPUTS.index(name) for name in given)
            node.domain, node.op_type = CONTRIB_DOMAIN, OP
            node.input[:] = [given.get(name, "") for name in INPUTS[: last + 1]]
            if "value_cache" not in given:
                node.attribute.append(helper.make_attribute("kv_cache_layout", "LATENT"))
    del twin.functions[:]
    domains = [entry for entry in twin.opset_import if entry.domain not in (DOMAIN, CONTRIB_DOMAIN)]
    del twin.opset_import[:]
    twin.opset_import.extend([*domains, helper.make_opsetid(CONTRIB_DOMAIN, 1)])
    return twin
