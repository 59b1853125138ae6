"""The audit finds what an exporter could get wrong: each fault is planted, and no folder may get its name."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import kvpass
from kvpass.exporters import formats
from kvpass.exporters.dialects import lowerings, onnx_rows, plain_ops
from kvpass.exporters.dialects.contracts import Port, Static
from kvpass.exporters.dialects.lowerings import Call, Lowering, Step
from kvpass.exporters.dialects.plain_ops import Keys

WINDOW, SOFTCAP, SINKS = "window by distance, float mask", "flex_attention, softcap and GQA", "sinks as gates"
STATIC = onnx_rows.ONNX_STATIC
Patch = pytest.MonkeyPatch


def change_call(patch: Patch, op: str, change: Callable[[Call], Call]) -> None:
    """Compute an op of the static dialect with other arguments."""
    before = lowerings.LOWERINGS[op, STATIC]
    patch.setitem(lowerings.LOWERINGS, (op, STATIC), Lowering(lambda call: before.run(change(call)), before.cannot))


def given(call: Call, **others: Any) -> Call:
    return Call(call.op, call.target, {**call.given, **others}, call.caches, call.step)


def change_model(patch: Patch, change: Callable[[Any], None]) -> None:
    """Change the ONNX model before it is saved."""
    before = formats.save

    def save(model: Any, folder: Path) -> None:
        change(model)
        before(model, folder)

    patch.setattr(formats, "save", save)


def no_window(patch: Patch) -> None:
    change_call(patch, "paged_attention", lambda call: given(call, window=None))


def window_off_by_one(patch: Patch) -> None:
    change_call(patch, "paged_attention", lambda call: given(call, window=call["window"] + 1))


def window_as_an_attribute(patch: Patch) -> None:
    """What TensorRT's parser drops without a word."""
    import onnx_ir

    def change(model: Any) -> None:
        for node in model.graph:
            if node.op_type == "Attention":
                node.attributes["left_window_size"] = onnx_ir.AttrInt64("left_window_size", 7)

    change_model(patch, change)


def scale_of_another_width(patch: Patch) -> None:
    change_call(patch, "paged_attention", lambda call: given(call, scale=call["scale"] * 1.1))


def keys_and_values_exchanged(patch: Patch) -> None:
    change_call(patch, "write_cache", lambda call: given(call, key=call["value"], value=call["key"]))


def written_one_place_on(patch: Patch) -> None:
    def step(self: Static, plan: kvpass.CachePlan, values: list[Tensor], caches: list[Tensor]) -> Step:
        found = STEP(self, plan, values, caches)
        found.shared["past"] = values[1] + 1
        return found

    patch.setattr(Static, "step", step)


def causal_from_the_upper_left(patch: Patch) -> None:
    """As an attention does that counts the queries of each step from 0."""

    def positions(call: Call) -> Tensor:
        return torch.arange(call.step.width).expand(call.step.seq_lens.shape[0], -1)

    patch.setattr(onnx_rows, "_positions", positions)


def logits_of_the_first_token(patch: Patch) -> None:
    def step(self: Static, plan: kvpass.CachePlan, values: list[Tensor], caches: list[Tensor]) -> Step:
        found = STEP(self, plan, values, caches)
        found.logits_index = torch.arange(values[0].shape[0]) * found.width
        return found

    patch.setattr(Static, "step", step)


def bindings_exchanged_between_layers(patch: Patch) -> None:
    def change(model: Any) -> None:
        first, second = (next(v for v in model.graph.outputs if v.name == f"key_cache_{i}_out") for i in (0, 1))
        first.name, second.name = "between", first.name
        first.name = "key_cache_1_out"
        places = [list(model.graph.outputs).index(value) for value in (first, second)]
        model.graph.outputs[places[0]], model.graph.outputs[places[1]] = second, first

    change_model(patch, change)


def a_transposed_weight(patch: Patch) -> None:
    import onnx_ir

    def change(model: Any) -> None:
        for value in model.graph.initializers.values():
            shape = list(value.shape)
            if len(shape) == 2 and shape[0] == shape[1] and shape[0] > 8:
                value.const_value = onnx_ir.tensor(value.const_value.numpy().T.copy(), name=value.name)
                return
        raise AssertionError("no square weight")

    change_model(patch, change)


def an_input_that_nothing_reads(patch: Patch) -> None:
    patch.setattr(Static, "inputs", lambda self, plan: more(INPUTS(self, plan)))
    patch.setattr(Static, "examples", lambda self, plan: [*EXAMPLES(self, plan), torch.zeros(3, dtype=torch.int64)])
    patch.setattr(Static, "step", lambda self, plan, values, caches: STEP(self, plan, values[:3], caches))


def more(ports: list[Port]) -> list[Port]:
    return [*ports[:3], Port("nonpad_kv_seqlen", torch.int64, ("batch",), "left out by the lowering"), *ports[3:]]


def no_sinks(patch: Patch) -> None:
    change_call(patch, "paged_attention", lambda call: given(call, sinks=None))


def mask_before_the_softcap(patch: Patch) -> None:
    """The order of an older edition of the standard: the softcap brings what was masked back."""

    def attend(query: Tensor, keys: Tensor, values: Tensor, places: Tensor, where: Keys, facts: Any) -> Tensor:
        cap = facts["softcap"]
        hidden = -2 * cap * (~plain_ops.visible(places, where, facts)).float()
        group = query.shape[2] // keys.shape[1]
        wide = [part.repeat_interleave(group, 1) for part in (keys, values)]
        scores = query.transpose(1, 2) @ wide[0].transpose(2, 3) * facts["scale"] + hidden[:, None]
        return (torch.softmax(torch.tanh(scores / cap) * cap, -1) @ wide[1]).transpose(1, 2)

    patch.setattr(onnx_rows, "attend", attend)


STEP, INPUTS, EXAMPLES = Static.step, Static.inputs, Static.examples
FAULTS: dict[str, tuple[str, Callable[[Patch], None], str]] = {
    "no window": (WINDOW, no_window, "logits of sequence"),
    "an input that nothing reads": (WINDOW, an_input_that_nothing_reads, "nothing reads the input nonpad_kv_seqlen"),
    "a window off by one": (WINDOW, window_off_by_one, "logits of sequence"),
    "a window as an attribute": (WINDOW, window_as_an_attribute, "leaves to left_window_size|no valid model"),
    "another scale": (WINDOW, scale_of_another_width, "logits of sequence"),
    "keys and values exchanged": (WINDOW, keys_and_values_exchanged, "logits of sequence"),
    "written one place on": (WINDOW, written_one_place_on, "logits of sequence"),
    "causal from the upper left": (WINDOW, causal_from_the_upper_left, "logits of sequence"),
    "logits of the first token": (WINDOW, logits_of_the_first_token, "logits of sequence"),
    "bindings exchanged": (WINDOW, bindings_exchanged_between_layers, "logits of sequence|inputs are not|outputs are"),
    "a transposed weight": (WINDOW, a_transposed_weight, "logits of sequence"),
    "no sinks": (SINKS, no_sinks, "logits of sequence"),
    "the mask before the softcap": (SOFTCAP, mask_before_the_softcap, "logits of sequence"),
}


@pytest.mark.sampled(13, 3)
@pytest.mark.parametrize("name", FAULTS)
def test_caught(name: str, engines: Callable[[str], kvpass.Engine], tmp_path: Path, monkeypatch: Patch) -> None:
    model, plant, words = FAULTS[name]
    plant(monkeypatch)
    with pytest.raises(kvpass.VerificationError, match=words):
        engines(model).export(tmp_path / "out", "onnx", context=96)
    assert not list(tmp_path.iterdir())
