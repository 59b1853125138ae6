"""What a failed torch.export says, and what of the forward stands in its way."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import (
    DataDependentOutputException,
    DynamicOutputShapeException,
    UnsupportedFakeTensorException,
    UnsupportedOperatorException,
)
from torch.fx.experimental.symbolic_shapes import GuardOnDataDependentSymNode

BY_VALUE = (GuardOnDataDependentSymNode, DataDependentOutputException, DynamicOutputShapeException)
NO_RULE = (UnsupportedFakeTensorException, UnsupportedOperatorException)
# Told by words: torch raises these as plain RuntimeErrors.
NO_RULE_WORDS = ("no fake impl", "not supported for tensor subclasses", "Meta tensors", "meta kernel")
HELD_WORDS = ("found a fake tensor in the exported program constant",)


def why_not_captured(error: Exception, model: nn.Module, inputs: tuple[Tensor, ...]) -> str:
    """The first line of an error of torch.export, and what can be done about it.

    Args:
        error: what export raised.
        model: what was exported; it is run where the error does not say enough.
        inputs: the example that it was exported with.
    """
    lines = str(error).strip().splitlines()
    first = lines[0] if lines else type(error).__name__
    return f"{first}\n{_advice(error, str(error), model, inputs)}; the original error is chained above."


def _advice(error: Exception, text: str, model: nn.Module, inputs: tuple[Tensor, ...]) -> str:
    if isinstance(error, BY_VALUE) or "data-dependent" in text:
        return "kvpass needs a forward without data-dependent Python control flow, and without .item() on activations"
    if any(words in text for words in HELD_WORDS):
        return "the forward takes a tensor by .data, or keeps one that it computed: use the tensor itself"
    if isinstance(error, NO_RULE) or any(words in text for words in NO_RULE_WORDS):
        return (
            "the forward calls something that only works on real numbers: write it with torch ops, or give a custom op "
            "its shapes with register_fake"
        )
    shapes = " and ".join(f"int64 {list(each.shape)}" for each in inputs)
    named = f"token ids{' and position ids' if len(inputs) > 1 else ''} {shapes}"
    try:
        with torch.no_grad():
            model(*inputs)
    except Exception as raised:  # whatever a model raises: it is told
        return f"the model itself raises {type(raised).__name__} for {named}, which kvpass calls it with"
    return f"the model itself runs with {named}, but not with sizes of any batch and length, as a capture has them"
