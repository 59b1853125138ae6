"""The front door's view of a user's model: how to call it, and what it returns.

The passes see a module that takes token ids (and position ids, where the model demands them) and returns logits.
Conveniences for transformers live here and nowhere else.
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from kvpass.errors import InputError
from kvpass.fx_passes.capture.capture import EXAMPLE_BATCH, EXAMPLE_LENGTH
from kvpass.outputs import Path, find_logits, logits_at, watched_tables
from kvpass.types import Sampling

MODEL = "model"  # attribute of the adapter that holds the user's module
IDS = ("input_ids", "ids", "tokens", "token_ids", "idx", "x")
POSITIONS = ("position_ids", "positions", "pos_ids", "pos")


class LogitsModel(nn.Module):
    """Calls the user's model and hands out its logits.

    ``forward(input_ids [B, S], position_ids [B, S] | None) -> logits [B, S, V]``.

    Attributes:
        copied: tensors that are neither parameters nor buffers, as copies that captures saw, and the model's own.
    """

    def __init__(self, model: nn.Module, takes_positions: bool = False) -> None:
        super().__init__()
        self.model = model
        self.copied: list[tuple[Tensor, Tensor]] = []
        self.ids_name, self.positions_name, self.fixed = _call_form(model, takes_positions)
        self.path: Path | None = None  # of the logits among the results, see :func:`locate_logits`
        self.train(model.training)

    @property
    def takes_positions(self) -> bool:
        """Whether the model is called with position ids."""
        return self.positions_name is not None

    def forward(self, input_ids: Tensor, position_ids: Tensor | None = None) -> Tensor:
        """Logits ``[B, S, V]`` of token ids ``[B, S]``."""
        output = self.call(input_ids, position_ids)
        batch, length = input_ids.shape
        return logits_at(output, find_logits(output, batch, length) if self.path is None else self.path)

    def call(self, input_ids: Tensor, position_ids: Tensor | None = None) -> Any:
        """All that the model returns."""
        named = dict(self.fixed)
        if self.positions_name is not None:
            if position_ids is None:
                position_ids = torch.arange(input_ids.shape[1], device=input_ids.device).expand_as(input_ids)
            named[self.positions_name] = position_ids
        if self.ids_name is None:
            return self.model(input_ids, **named)
        return self.model(**{self.ids_name: input_ids}, **named)


class TwoInputs(nn.Module):
    """A :class:`LogitsModel` whose forward takes exactly the inputs that are captured."""

    def __init__(self, inner: LogitsModel) -> None:
        super().__init__()
        self.model = inner
        self.train(inner.training)

    def forward(self, input_ids: Tensor, position_ids: Tensor) -> Tensor:
        """Logits ``[B, S, V]``."""
        logits: Tensor = self.model(input_ids, position_ids)
        return logits


class OneInput(nn.Module):
    """A :class:`LogitsModel` that is captured with token ids alone."""

    def __init__(self, inner: LogitsModel) -> None:
        super().__init__()
        self.model = inner
        self.train(inner.training)

    def forward(self, input_ids: Tensor) -> Tensor:
        """Logits ``[B, S, V]``."""
        logits: Tensor = self.model(input_ids)
        return logits


def locate_logits(model: LogitsModel, example: tuple[Tensor, ...]) -> None:
    """Find out which of the model's results are its logits, on a copy of it that is run on an example.

    Raises:
        InputError: if there are none, or if they cannot be told from the rest.
    """
    twin = for_capture(model).model
    try:
        output, rows = watched_tables(lambda: twin.call(*example), example[0])
    except Exception:  # what cannot run is left to the capture, which says why
        return
    batch, length = example[0].shape
    model.path = find_logits(output, batch, length, rows)


def has_own_cache(model: nn.Module) -> bool:
    """Whether the model keeps a cache of its own unless it is called with ``use_cache=False``."""
    parameters = inspect.signature(model.forward).parameters
    takes_more = any(p.kind is inspect.Parameter.VAR_KEYWORD for p in parameters.values())
    return "use_cache" in parameters or (takes_more and hasattr(getattr(model, "config", None), "use_cache"))


def _call_form(model: nn.Module, takes_positions: bool) -> tuple[str | None, str | None, dict[str, Any]]:
    """Names under which token ids and position ids are passed, and arguments that are always the same."""
    parameters = inspect.signature(model.forward).parameters
    names = list(parameters)
    ids = next((name for name in IDS if name in names), None)
    if ids is not None and parameters[ids].kind is inspect.Parameter.POSITIONAL_ONLY:
        ids = None
    positions = next((name for name in POSITIONS if name in names and name != ids), None)
    demanded = positions is not None and parameters[positions].default is inspect.Parameter.empty
    if takes_positions and positions is None:
        raise InputError(f"example_inputs holds position ids, but the model's forward takes none of {POSITIONS}")
    fixed: dict[str, Any] = {"use_cache": False} if has_own_cache(model) else {}
    if "return_dict" in parameters:
        fixed["return_dict"] = True
    kinds = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
    known = {ids or (names[0] if names else ""), positions}
    missing = [n for n, p in parameters.items() if p.default is p.empty and p.kind not in kinds and n not in known]
    if missing:
        raise InputError(
            f"the model's forward demands {', '.join(missing)}: wrap it in a module whose forward takes token ids "
            "(and position_ids) and returns logits"
        )
    return ids, positions if demanded or takes_positions else None, fixed


def for_capture(model: LogitsModel) -> OneInput | TwoInputs:
    """A module to export: a copy of the user's module tree that shares every parameter and buffer.

    Being exported changes some modules (they keep masks or counters as attributes); the user's own stays as it was.
    """
    shared = {id(t): t for t in (*model.parameters(), *model.buffers())}
    try:
        model.copied = []
        memo: dict[int, Any] = dict(shared)
        copied = copy.deepcopy(model, memo)
        originals = [tensor for tensor in memo.get(id(memo), ()) if isinstance(tensor, Tensor)]
        model.copied = [(memo[id(tensor)], tensor) for tensor in originals]
    except Exception:  # a module that cannot be copied is captured as it is
        copied = model
    return TwoInputs(copied) if model.takes_positions else OneInput(copied)


def example_for(model: LogitsModel, device: torch.device) -> tuple[Tensor, ...]:
    """Token ids 0 of the example's shape, and position ids where the model takes them."""
    ids = torch.zeros(EXAMPLE_BATCH, EXAMPLE_LENGTH, dtype=torch.int64, device=device)
    if not model.takes_positions:
        return (ids,)
    return ids, torch.arange(EXAMPLE_LENGTH, device=device).repeat(EXAMPLE_BATCH, 1)


def check_example(example: Any) -> bool:
    """Whether ``example_inputs`` holds position ids.

    Raises:
        InputError: if it is not token ids ``[B, S]``, alone or with position ids of the same shape.
    """
    values = list(example.values()) if isinstance(example, Mapping) else example
    values = [values] if isinstance(values, Tensor) else list(values)
    good = 1 <= len(values) <= 2 and all(isinstance(v, Tensor) and v.dim() == 2 for v in values)
    if not good or any(v.is_floating_point() or v.shape != values[0].shape for v in values):
        raise InputError(
            "example_inputs must be token ids [batch, length], or a pair of token ids and position ids of one shape, "
            "as integer tensors"
        )
    return len(values) == 2


def example_ids(example: Any) -> Tensor:
    """Token ids ``[B, S]`` of ``example_inputs`` that were checked."""
    values = list(example.values()) if isinstance(example, Mapping) else example
    return values if isinstance(values, Tensor) else next(iter(values))


def text_sampling(model: nn.Module) -> Sampling:
    """How the model's own generation config says that tokens are chosen; greedy where it says nothing."""
    config = getattr(model, "generation_config", None)
    if config is None or not getattr(config, "do_sample", False):
        return Sampling()
    names = ("temperature", "top_p", "top_k", "min_p", "repetition_penalty")
    found = {name: getattr(config, name, None) for name in names}
    return Sampling(**{"temperature": 1.0} | {name: value for name, value in found.items() if value is not None})


def end_of_sequence(model: nn.Module) -> tuple[int, ...]:
    """Token ids that end a sequence, where the model's own configuration names them."""
    for holder in (getattr(model, "generation_config", None), getattr(model, "config", None)):
        value = getattr(holder, "eos_token_id", None)
        if isinstance(value, int):
            return (value,)
        if isinstance(value, (list, tuple)) and all(isinstance(v, int) for v in value):
            return tuple(value)
    return ()
