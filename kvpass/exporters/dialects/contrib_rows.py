"""The dialect ``onnx-contrib``: ``com.microsoft::GroupQueryAttention`` of ONNX Runtime over static caches.

One node writes the new rows of a cache and attends over it, so a write waits until the attention that reads it hands
the new cache back; a second attention over the same cache writes the same rows once more, at the same places. What is
said of the node here was found by running it on a CPU (tests/exporters/test_contrib.py runs it again):

* rows are padded on the right, ``query_seqlens`` says how many are new and ``seqlens_k`` how long a sequence then is,
  less one; only new rows are written, at any mix of pasts, and what lies behind them is not looked at;
* ``local_window_size`` counts the query's own key; ``softcap`` comes before ``attention_bias``, and ``-inf`` hides a
  key; ``head_sink`` is one more logit without a value;
* a ``scale`` or ``softcap`` of 0 means that there is none; rows of padding come out as whatever was in memory, and of a
  query that sees nothing zeros in float32, NaN in float16.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.fx import Node
from torch.nn.functional import pad

from kvpass.exporters.dialects.contracts import Port, Static
from kvpass.exporters.dialects.lowerings import Call, Facts, Step, lowers
from kvpass.exporters.dialects.onnx_rows import KEYS, PAST
from kvpass.exporters.dialects.plain_ops import Keys, no_trees_or_codes, norm_rotary_write, position_bias, visible
from kvpass.types import CachePlan

ONNX_CONTRIB = "onnx-contrib"
CONTRIB_DOMAIN = "com.microsoft"
WAITING = "rows that wait to be written"
HEAD_STEP = 8  # widths of heads are multiples of it
NO_ROTATION, NO_CODES_NOR_NORMS = [None] * 3, [None] * 4  # inputs that no node is given
BIASED = ("slopes", "bias", "chunk")  # what attention_bias says


@dataclass(frozen=True)
class EvenRows(Static):
    """A batch whose rows own ``context`` places each, of one width for keys and values, a multiple of 8.

    Keys and values that are narrower have zeros behind them, which neither scores nor sums show.
    """

    def inputs(self, plan: CachePlan) -> list[Port]:
        """All inputs in order, the caches last."""
        return [
            port if port.cache is None else replace(port, shape=(*port.shape[:3], even(widest_row(plan, port.cache))))
            for port in super().inputs(plan)
        ]


def even(width: int) -> int:
    """The width of a head as the node takes it."""
    return -(-width // HEAD_STEP) * HEAD_STEP


def widest_row(plan: CachePlan, cache: str) -> int:
    """The larger width of keys and values, of the cache that an input of the graph is a part of."""
    spec = plan.caches[int(cache.rpartition("_")[2])]
    return max(spec.key_dim, spec.value_dim)


def cannot_attend(facts: Facts) -> str | None:
    """What of an attention neither op of ONNX Runtime says."""
    if not facts["scale"]:
        return "a scale of 0"  # which the node takes for 1 / sqrt(width)
    if facts.get("softcap") is not None and not facts["softcap"] > 0:
        return f"a softcap of {facts['softcap']}"  # which the node takes for none
    if "key_cache" in facts and facts["key_cache"] is facts["value_cache"]:
        return "a cache whose keys are its values"
    caches = [facts[name] for name in ("key_cache", "value_cache", "cache") if name in facts]
    dtypes = {_example(tensor).dtype for tensor in (facts["query"], *caches)}
    return no_trees_or_codes(facts) or ("a cache of other numbers than the model's" if len(dtypes) > 1 else None)


def _example(tensor: Any) -> Tensor:
    value = tensor.meta["val"] if isinstance(tensor, Node) else tensor
    assert isinstance(value, Tensor)
    return value


def wide(tokens: Tensor, width: int) -> Tensor:
    """``[T, H, D]`` as ``[T, H, width]``, with zeros behind the D numbers of a head."""
    return pad(tokens, (0, width - tokens.shape[2])) if width > tokens.shape[2] else tokens


def flat_rows(tokens: Tensor, width: int, step: Step) -> Tensor:
    """``[T, H, D]`` as ``[batch, width of the batch, H * width]``."""
    return wide(tokens, width).reshape(-1, step.width, tokens.shape[1] * width)


@lowers("write_cache", ONNX_CONTRIB, no_trees_or_codes)
def _write(call: Call) -> None:
    waiting = call.step.once(WAITING, dict)
    for part in ("key", "value"):
        name, rows = f"{part}_cache", call[part]
        (cache,) = call[name]
        waiting[call.caches[name]] = rows.shape[2], flat_rows(rows.to(cache.dtype), cache.shape[3], call.step)


def waiting_rows(call: Call, name: str) -> Any:
    """What the write before an attention has left for the cache that is the argument ``name``."""
    cache, waiting = call.caches[name], call.step.once(WAITING, dict)
    if cache not in waiting:
        raise LookupError(f"{cache} is read before the step has written it")
    return waiting[cache]


@lowers("norm_rotary_write", ONNX_CONTRIB, no_trees_or_codes)
def _fused(call: Call) -> Tensor:
    return norm_rotary_write(call, _write)


@lowers("paged_attention", ONNX_CONTRIB, cannot_attend)
def _attention(call: Call) -> Tensor:
    step, query, heads = call.step, call["query"], call["query"].shape[1]
    (keys,), (values,) = call["key_cache"], call["value_cache"]
    (_, key), (dim, value) = waiting_rows(call, "key_cache"), waiting_rows(call, "value_cache")
    rows, (bias, blind), sinks = flat_rows(query, keys.shape[3], step), _bias(call), call.given.get("sinks")
    ends, counts, total = step.once("lengths of the node", lambda: _lengths(step))
    sinks = None if sinks is None else sinks.to(query.dtype)
    inputs = [rows, key, value, keys, values, ends, total, *NO_ROTATION, bias, sinks, *NO_CODES_NOR_NORMS, counts]
    numbers: dict[str, Any] = {"num_heads": heads, "kv_num_heads": keys.shape[1], "scale": float(call["scale"])}
    if call.given.get("softcap") is not None:
        numbers["softcap"] = float(call["softcap"])
    if call.given.get("window") is not None:
        numbers["local_window_size"] = int(call["window"])
    out, *after = torch.onnx.ops.symbolic_multi_out(
        f"{CONTRIB_DOMAIN}::GroupQueryAttention", inputs, numbers, version=1,
        dtypes=[query.dtype, keys.dtype, values.dtype], shapes=[rows.shape, keys.shape, values.shape],
    )  # fmt: skip
    for name, cache in zip(("key_cache", "value_cache"), after, strict=True):
        call.write(name, (cache,))
    # Whatever was in memory may be NaN, and a model may make an index of a number.
    columns = torch.arange(step.width, device=query.device)
    shown = step.once("is new", lambda: (columns < counts[:, None])[..., None, None])
    shown = shown if blind is None else shown & ~blind
    by_head = out.unflatten(2, (heads, -1))[..., :dim]
    return torch.where(shown, by_head, 0.0).flatten(0, 1)


def _lengths(step: Step) -> tuple[Tensor, Tensor, Tensor]:
    """``seqlens_k`` and ``query_seqlens``, int32 ``[batch]``, and ``total_sequence_length``, an int32 scalar.

    Of a step that does not fit the node writes nothing, and nor does it stop the others.
    """
    places, past = step.shared[KEYS].positions, step.shared[PAST]
    lens = step.seq_lens
    ends, counts = (torch.where(step.fits, part, 0).to(torch.int32) for part in (lens - 1, lens - past))
    total = torch.full((), places.shape[0], dtype=torch.int32, device=past.device)
    return ends, counts, total


def _bias(call: Call) -> tuple[Tensor | None, Tensor | None]:
    """What is added to the scores, for what no attribute says, and the queries that see nothing, of tables of pairs.

    Returns:
        ``[batch | 1, Hq | 1, width, context]`` in the query's dtype, and bool ``[batch | 1, width, Hq | 1, 1]``.
    """
    given = {name: call.given[name] for name in BIASED if call.given.get(name) is not None}
    if not given:
        return None, None
    where, query = call.step.shared[KEYS], call["query"]
    assert isinstance(where, Keys)
    positions = call.step.positions.reshape(-1, call.step.width)
    (keys,) = call["key_cache"]
    groups = (keys.shape[1], query.shape[1] // keys.shape[1])
    found = position_bias(positions, where, given, groups, torch.float32)
    bias = torch.zeros((), device=query.device) if found is None else found.flatten(1, 2)
    seen = visible(positions, where, call.given)[:, None]
    blind = (bias.masked_fill(~seen, -torch.inf).amax(-1) == -torch.inf).transpose(1, 2)[..., None]
    if "chunk" in given:
        bias = torch.where(seen, bias, -torch.inf)
    return bias.to(query.dtype), blind if "bias" in given else None
