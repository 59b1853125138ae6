"""ONNX Runtime's own ops: what its kernel and schemas do is what the dialects rest on, and what they do not is refused.

The first half runs single nodes, so that a runtime that changes its mind is found before a model is.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import kvpass
from kvpass.exporters.dialects import contrib_paged, contrib_rows, lowerings
from kvpass.exporters.dialects.contrib_paged import cannot_page, cannot_page_latents, no_paged_caches
from kvpass.exporters.dialects.contrib_rows import EvenRows, cannot_attend
from kvpass.exporters.dialects.lowerings import Call, Lowering
from kvpass.exporters.dialects.plain_ops import Keys, attend
from kvpass.exporters.writers import contrib_files
from kvpass.types import CachePlan, CacheSpec
from tests.decoders import masks, scores
from tests.decoders.catalogue import DECODERS
from tests.decoders.skeleton import DIM as WHOLE
from tests.decoders.skeleton import Builder, one_layer_around

onnx = pytest.importorskip("onnx")
onnxruntime = pytest.importorskip("onnxruntime")

CONTEXT, WIDTH, HEADS, KV_HEADS, DIM = 24, 5, 4, 2, 8
NAMES = (
    "query", "key", "value", "past_key", "past_value", "seqlens_k", "total_sequence_length", "cos_cache", "sin_cache",
    "position_ids", "attention_bias", "head_sink", "k_scale", "v_scale", "q_norm_weight", "k_norm_weight",
    "query_seqlens",
)  # fmt: skip
# Pasts and new tokens of the rows: a prompt, a chunk behind a past, a decode, a row that fills its places.
PAST, NEW = torch.tensor([0, 2, 7, 19]), torch.tensor([5, 3, 1, 5])
TOLERANCE = {torch.float32: 2e-6, torch.float16: 3e-3}


def run_node(feeds: dict[str, Tensor], numbers: dict[str, Any], in_place: bool = True) -> list[Tensor]:
    """One GroupQueryAttention: its output and both caches after it."""
    arrays = {name: tensor.numpy().copy() for name, tensor in feeds.items()}
    helper = onnx.helper
    kinds = {name: helper.np_dtype_to_tensor_dtype(array.dtype) for name, array in arrays.items()}
    inputs = [helper.make_tensor_value_info(name, kinds[name], array.shape) for name, array in arrays.items()]
    outputs = [helper.make_tensor_value_info(name, kinds["query"], None) for name in ("out", "keys", "values")]
    formal = [name if name in feeds else "" for name in NAMES]
    names = ["out", "keys", "values"]
    node = helper.make_node("GroupQueryAttention", formal, names, domain="com.microsoft", **numbers)
    opsets = [helper.make_opsetid("", 23), helper.make_opsetid("com.microsoft", 1)]
    model = helper.make_model(helper.make_graph([node], "one", inputs, outputs), opset_imports=opsets, ir_version=10)
    options = onnxruntime.SessionOptions()
    options.log_severity_level, options.intra_op_num_threads = 4, 1
    session = onnxruntime.InferenceSession(model.SerializeToString(), options, ["CPUExecutionProvider"])
    binding = session.io_binding()
    held = {name: onnxruntime.OrtValue.ortvalue_from_numpy(array) for name, array in arrays.items()}
    for name, value in held.items():
        binding.bind_ortvalue_input(name, value)
    binding.bind_output("out")
    for name, past in (("keys", "past_key"), ("values", "past_value")):
        binding.bind_ortvalue_output(name, held[past]) if in_place else binding.bind_output(name)
    session.run_with_iobinding(binding)
    return [torch.from_numpy(value.numpy().copy()) for value in binding.get_outputs()]


def feeds_of(dtype: torch.dtype = torch.float32, past: Tensor = PAST, new: Tensor = NEW) -> dict[str, Tensor]:
    """Random rows; what no query may look at is NaN, in the caches and in the padding."""
    generator = torch.Generator().manual_seed(3)
    rows = len(past)

    def random(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator).to(dtype)

    found = {"query": random(rows, WIDTH, HEADS * DIM)}
    found |= {name: random(rows, WIDTH, KV_HEADS * DIM) for name in ("key", "value")}
    found |= {name: random(rows, KV_HEADS, CONTEXT, DIM) for name in ("past_key", "past_value")}
    for row in range(rows):
        for name in ("query", "key", "value"):
            found[name][row, new[row] :] = torch.nan
        for name in ("past_key", "past_value"):
            found[name][row, :, past[row] :] = torch.nan
    found["seqlens_k"] = (past + new - 1).int()
    found["total_sequence_length"] = torch.tensor(CONTEXT, dtype=torch.int32)
    return found | {"query_seqlens": new.int()}


def meant(feeds: dict[str, Tensor], given: dict[str, Any], past: Tensor = PAST, new: Tensor = NEW) -> list[Tensor]:
    """The same by the reference: attention ``[B, S, H * D]`` and the caches with the new rows."""
    query = feeds["query"].unflatten(2, (HEADS, DIM))
    caches = []
    for cache, rows in (("past_key", "key"), ("past_value", "value")):
        held = feeds[cache].clone()
        for row, (start, count) in enumerate(zip(past, new, strict=True)):
            held[row, :, start : start + count] = feeds[rows][row, :count].unflatten(1, (KV_HEADS, DIM)).transpose(0, 1)
        caches.append(held)
    positions = past[:, None] + torch.arange(WIDTH)
    held = torch.arange(CONTEXT) < (past + new)[:, None]
    where = Keys(torch.arange(CONTEXT), held)
    out = attend(query, caches[0], caches[1], positions, where, given)
    return [out.flatten(2), *caches]


def hidden_bias(dtype: torch.dtype) -> Tensor:
    """A bias table by pairs of positions, of which some pairs are hidden; in float32 one query sees nothing."""
    generator = torch.Generator().manual_seed(5)
    table = torch.randn(HEADS, CONTEXT, CONTEXT, generator=generator).masked_fill(
        torch.rand(CONTEXT, CONTEXT, generator=generator) < 0.3, -torch.inf
    )
    table[:, :, 0] = 0.0
    table[:, 3] = -torch.inf if dtype == torch.float32 else 0.0
    return table.to(dtype)


SINKS = torch.tensor([0.5, -1.0, 2.0, 0.0])
FACTS: dict[str, dict[str, Any]] = {
    "nothing": {},
    "a window of one": {"window": 1},
    "a window": {"window": 3},
    "a window of all": {"window": 60},
    "a softcap": {"softcap": 0.7},
    "sinks": {"sinks": SINKS},
    "a bias": {"bias": True},
    "all of it": {"window": 4, "softcap": 1.5, "sinks": SINKS, "bias": True},
}


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("name", FACTS)
def test_the_kernel_does_what_is_said_of_it(name: str, dtype: torch.dtype) -> None:
    given: dict[str, Any] = {"scale": 0.3, **FACTS[name]}
    feeds, numbers = feeds_of(dtype), {"num_heads": HEADS, "kv_num_heads": KV_HEADS, "scale": 0.3}
    if "window" in given:
        numbers["local_window_size"] = given["window"]
    if "softcap" in given:
        numbers["softcap"] = given["softcap"]
    if "sinks" in given:
        feeds["head_sink"] = given["sinks"].to(dtype)
    if "bias" in given:
        given["bias"] = hidden_bias(dtype)
        positions = (PAST[:, None] + torch.arange(WIDTH)).clamp(max=CONTEXT - 1)
        feeds["attention_bias"] = given["bias"][:, positions].transpose(0, 1).contiguous()
    expected = meant(feeds, given)
    for in_place in (True, False):
        out, *caches = run_node(feeds, numbers, in_place)
        for row, (past, new) in enumerate(zip(PAST, NEW, strict=True)):
            torch.testing.assert_close(out[row, :new].float(), expected[0][row, :new], atol=TOLERANCE[dtype], rtol=1e-3)
            for cache, reference in zip(caches, expected[1:], strict=True):
                assert torch.equal(cache[row, :, : past + new], reference[row, :, : past + new])


def test_a_step_without_new_tokens_changes_nothing() -> None:
    """What the node is given where a step does not fit."""
    feeds = feeds_of()
    feeds |= {"seqlens_k": torch.zeros(4, dtype=torch.int32), "query_seqlens": torch.zeros(4, dtype=torch.int32)}
    _, *caches = run_node(feeds, {"num_heads": HEADS, "kv_num_heads": KV_HEADS, "scale": 0.3})
    for cache, name in zip(caches, ("past_key", "past_value"), strict=True):
        assert torch.equal(cache.nan_to_num(7.0), feeds[name].nan_to_num(7.0))


@pytest.mark.parametrize("numbers", [{"scale": 0.0}, {"scale": 0.3, "softcap": 0.0}], ids=str)
def test_a_zero_stands_for_nothing_and_is_refused(numbers: dict[str, float]) -> None:
    feeds, heads = feeds_of(), {"num_heads": HEADS, "kv_num_heads": KV_HEADS}
    out, *_ = run_node(feeds, {**heads, **numbers})
    plain = {name: value for name, value in numbers.items() if value}
    other, *_ = run_node(feeds, {**heads, **plain})
    assert torch.equal(out[3], other[3])
    assert cannot_attend({**facts_of(), **numbers}) is not None


def facts_of(**others: Any) -> dict[str, Any]:
    query, keys, values = torch.zeros(3, 4, 8), torch.zeros(2, 2, 16, 8), torch.zeros(2, 2, 16, 8)
    return {"query": query, "key_cache": keys, "value_cache": values, "scale": 0.3, **others}


ONE = torch.zeros(1)
KEYS = torch.zeros(2, 2, 16, 8)
REFUSED: dict[str, tuple[Callable[[dict[str, Any]], str | None], dict[str, Any], str | None]] = {
    "plain": (cannot_attend, {}, None),
    "a window": (cannot_attend, {"window": 7, "softcap": 3.0, "sinks": ONE}, None),
    "a scale of 0": (cannot_attend, {"scale": 0.0}, "a scale of 0"),
    "a softcap of 0": (cannot_attend, {"softcap": 0.0}, "a softcap of 0.0"),
    "a tree": (cannot_attend, {"tree_mask": ONE}, "a tree mask"),
    "codes": (cannot_attend, {"key_format": "int8"}, "a cache in int8"),
    "halves": (cannot_attend, {"key_cache": KEYS.half()}, "a cache of other numbers than the model's"),
    "one cache": (cannot_attend, {"key_cache": KEYS, "value_cache": KEYS}, "a cache whose keys are its values"),
    "slopes by bias": (cannot_attend, {"slopes": ONE, "bias": ONE, "chunk": 8}, None),
    "slopes": (cannot_page, {"slopes": ONE}, "slopes"),
    "a bias": (cannot_page, {"bias": ONE}, "a bias"),
    "chunks": (cannot_page, {"chunk": 8}, "chunks"),
    "sinks, paged": (cannot_page, {"sinks": ONE}, None),
    "sinks of latents": (cannot_page_latents, {"sinks": ONE}, "sinks of a latent attention"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_an_op_does_not_say_is_refused(name: str) -> None:
    cannot, others, reason = REFUSED[name]
    assert cannot(facts_of(**others)) == reason


def test_caches_that_the_cuda_op_does_not_hold_are_refused() -> None:
    def plan(form: str, block_size: int) -> CachePlan:
        return CachePlan((CacheSpec("a", 2, 12, 10, form, form),), block_size, 97)

    assert no_paged_caches(plan("float32", 16)) == "a cache in float32"
    assert no_paged_caches(plan("float16", 8)) == "blocks of 8 tokens, which have to be 16 at least"
    assert no_paged_caches(plan("float16", 16)) is None
    shapes = [port.shape for port in EvenRows(64).inputs(plan("float32", 16)) if port.cache]
    assert shapes == [("batch", 2, 64, 16)] * 2


Patch = pytest.MonkeyPatch
ROWS, PAGES = contrib_rows.ONNX_CONTRIB, contrib_paged.ONNX_CONTRIB_PAGED


class Latent(nn.Module):
    """Keys and values expanded from one narrow latent."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.o = (nn.Linear(WHOLE, WHOLE, bias=False) for _ in range(2))
        self.down, self.up = nn.Linear(WHOLE, 12, bias=False), nn.Linear(12, 2 * WHOLE, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        q = self.q(x).unflatten(-1, (4, -1)).transpose(1, 2)
        k, v = self.up(self.down(x)).unflatten(-1, (4, -1)).transpose(1, 2).chunk(2, -1)
        return self.o(F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(2))


BUILDERS: dict[str, Builder] = {
    "a window": one_layer_around(masks.WindowByDistance),
    "sinks": one_layer_around(scores.SinkColumn),
    "latents": one_layer_around(Latent),
    "windows of two sizes": DECODERS["window in every other layer"],
}


def export(name: str, folder: Path, format: str, check: bool = True) -> kvpass.AuditResult | None:
    """Export a decoder, of halves where the format asks for them."""
    model, halves = BUILDERS[name](6), format.endswith("paged")
    config = kvpass.CacheConfig(block_size=16, num_blocks=1)
    with kvpass.compile(model.half() if halves else model, config, verify=False) as engine:
        return engine.export(folder, format, audit=check, **({} if halves else {"context": 96})).audit


def change_call(patch: Patch, dialect: str, **others: Any) -> None:
    """Compute attention with other arguments."""
    before = lowerings.LOWERINGS["paged_attention", dialect]

    def run(call: Call) -> Any:
        return before.run(Call(call.op, call.target, {**call.given, **others}, call.caches, call.step))

    patch.setitem(lowerings.LOWERINGS, ("paged_attention", dialect), Lowering(run, before.cannot))


def one_token_longer(patch: Patch) -> None:
    before = contrib_rows._lengths

    def lengths(step: Any) -> tuple[Tensor, Tensor, Tensor]:
        ends, counts, total = before(step)
        return ends + 1, counts, total

    patch.setattr(contrib_rows, "_lengths", lengths)


def one_token_more_past(patch: Patch) -> None:
    before = contrib_paged._lengths

    def lengths(step: Any) -> tuple[Tensor, Tensor]:
        starts, past = before(step)
        return starts, past + 1

    patch.setattr(contrib_paged, "_lengths", lengths)


def in_the_model_alone(change: Callable[[Any], None]) -> Callable[[Patch], None]:
    before = contrib_files.for_cuda

    def changed(twin: Any) -> Any:
        model = before(twin)
        change(next(node for node in model.graph.node if node.op_type == contrib_files.OP))
        return model

    return lambda patch: patch.setattr(contrib_files, "for_cuda", changed)


def set_to(name: str, value: int) -> Callable[[Any], None]:
    def change(node: Any) -> None:
        kept = [attribute for attribute in node.attribute if attribute.name != name]
        del node.attribute[:]
        node.attribute.extend([*kept, onnx.helper.make_attribute(name, value)])

    return change


FAULTS: dict[str, tuple[str, str, Callable[[Patch], None], str]] = {
    "a window off by one": ("a window", "ort-contrib", lambda p: change_call(p, ROWS, window=8), "logits of sequence"),
    "sinks left out": ("sinks", "ort-contrib", lambda p: change_call(p, ROWS, sinks=None), "logits of sequence"),
    "seqlens_k off by one": ("a window", "ort-contrib", one_token_longer, "logits of sequence|does not run"),
    "a window off by one, paged": (
        "a window", "ort-contrib-paged", lambda p: change_call(p, PAGES, window=8), "logits of sequence",
    ),
    "past_seqlens off by one": ("a window", "ort-contrib-paged", one_token_more_past, "logits of sequence"),
    "an attribute that the schema lacks": (
        "a window", "ort-contrib-paged", in_the_model_alone(set_to("window", 7)),
        "the attribute window",
    ),
    "another window for the CUDA provider": (
        "a window", "ort-contrib-paged", in_the_model_alone(set_to("local_window_size", 6)),
        "has other attributes than its twin",
    ),
}  # fmt: skip


@pytest.mark.slow
@pytest.mark.sampled(4, 100)
@pytest.mark.parametrize("name", FAULTS)
def test_a_planted_fault_is_caught(name: str, tmp_path: Path, monkeypatch: Patch) -> None:
    model, format, plant, words = FAULTS[name]
    plant(monkeypatch)
    with pytest.raises(kvpass.VerificationError, match=words):
        export(model, tmp_path / "out", format)
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
@pytest.mark.sampled(4, 100)
@pytest.mark.parametrize("format", ["ort-contrib", "ort-contrib-paged"])
@pytest.mark.parametrize("name", BUILDERS)
def test_a_decoder(name: str, format: str, tmp_path: Path) -> None:
    if (name, format) == ("latents", "ort-contrib"):
        with pytest.raises(
            kvpass.RefusedError, match="cannot express the op latent_attention; format pt2 or aoti or onnx"
        ):
            export(name, tmp_path / "out", format)
        return
    result = export(name, tmp_path / "out", format)
    assert result is not None and result.rows >= 20
    ops = {node.op_type for node in onnx.load(tmp_path / "out" / "model.onnx", load_external_data=False).graph.node}
    if format == "ort-contrib":
        a_step_that_does_not_fit_gives_nan(tmp_path / "out")
    assert ("PagedAttention" if format.endswith("paged") else "GroupQueryAttention") in ops


def a_step_that_does_not_fit_gives_nan(folder: Path) -> None:
    """And what is in the caches stays."""
    place: dict[str, Any] = {"__name__": "an_example"}
    exec((folder / "run.py").read_text(), place)
    decoder = place["Decoder"](folder)
    sequence = decoder.start()
    assert np.isfinite(decoder.step([sequence], [[3, 5, 7]])).all()
    before = [held.copy() for held in decoder.program.caches]
    lens = {"past_lens": np.full(4, decoder.context - 4), "new_lens": np.ones(4)}
    assert np.isnan(decoder.program.run(token_ids=np.zeros((4, 5)), **lens)).all()
    for held, was in zip(decoder.program.caches, before, strict=True):
        assert (held == was).all()
    # A prompt of two tokens beside a row that decodes, in fewer places than both together have.
    logits = decoder.step([sequence, decoder.start()], [[9], [3, 5]])
    assert np.isfinite(logits).all()
