"""What a forward that cannot be captured does across tokens: convolutions, loops and choices, by the ops' names.

The model runs at two lengths, and the ops that it calls are compared. Convolutions are looked for before the capture,
on fake tensors (no memory, no arithmetic, no trace left on the module): every graph that holds one over the tokens is
refused in the end, and some of them take minutes to export. The rest is told where a capture has failed anyway.
"""

from __future__ import annotations

import copy
import logging
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch._ops import OpOverload
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from kvpass.fx_passes.capture.alone import alone
from kvpass.types import Refusal

LENGTHS = (
    11,
    13,
)  # longer than common kernels, and more than one token apart: a loop over tokens is told from a switch
CHOICES = {"topk": 2, "sort": 1, "argsort": 1}  # ops that choose by value, and the place of their dim among the args


class _Convolution(NamedTuple):
    """One call: the module whose forward made it, and the sizes that the kernel moves along."""

    op: str
    path: str
    sizes: tuple[int, ...]
    kernel: tuple[int, ...]


@dataclass
class _Ops(TorchDispatchMode):
    """The ops that were called, how often, and the shapes that some of them were called with."""

    counts: Counter[str] = field(default_factory=Counter)
    convolutions: list[_Convolution] = field(default_factory=list)
    choices: list[tuple[str, int]] = field(default_factory=list)
    modules: list[str] = field(default_factory=list)  # paths of those whose forward is running, the outermost first

    def __post_init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]

    def __torch_dispatch__(self, func: OpOverload, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func.namespace == "aten":
            self.counts[str(func)] += 1
        name = func.overloadpacket.__name__
        if name == "convolution":
            path = self.modules[-1] if self.modules else ""
            self.convolutions.append(_Convolution(str(func), path, tuple(args[0].shape[2:]), tuple(args[1].shape[2:])))
        elif name in CHOICES and args[0].is_floating_point() and args[0].dim():
            place = CHOICES[name]
            dim = kwargs.get("dim", args[place] if len(args) > place else -1)
            self.choices.append((str(func), args[0].shape[dim]))
        return func(*args, **kwargs)


def convolutions_over_tokens(model: nn.Module, inputs: tuple[Tensor, ...], path_prefix: str = "") -> list[Refusal]:
    """A refusal for each convolution that was seen to read neighbouring tokens.

    Args:
        model: as given to :func:`~kvpass.fx_passes.capture.capture.capture`.
        inputs: example inputs ``[batch, length]``, for their number, dtype and device.
        path_prefix: where ``model`` holds the user's module, to be left out of module paths.
    """
    with alone():
        runs = [_watch_fake(model, inputs, length) for length in LENGTHS]
    found: dict[str, Refusal] = {}
    for call, width in _wide_convolutions(*runs):
        path = "" if call.path == path_prefix else call.path.removeprefix(f"{path_prefix}.")
        found.setdefault(path, Refusal(_reads_neighbours(call, width), call.op, path, "capture"))
    return list(found.values())


def token_mixers(model: nn.Module, inputs: tuple[Tensor, ...]) -> str:
    """What the forward does across tokens, as an addition to a refusal; empty if nothing was found.

    Args:
        model: as given to :func:`~kvpass.fx_passes.capture.capture.capture`; it is run.
        inputs: example inputs ``[batch, length]``, for their number, dtype and device.
    """
    try:
        runs = [_watch(model, inputs, length) for length in LENGTHS]
    except Exception:  # whatever a model raises at these lengths: it only means that nothing is known
        return ""
    found = [_convolution(*runs), _loop(*runs), _choice(*runs)]
    return "".join(f"; {each}" for each in found if each)


def _watch(model: nn.Module, inputs: tuple[Tensor, ...], length: int) -> _Ops:
    ops = _Ops()
    with torch.no_grad(), ops:
        model(*_inputs_of(inputs, length))
    return ops


def _watch_fake(model: nn.Module, inputs: tuple[Tensor, ...], length: int) -> _Ops:
    """The ops of a run on fake tensors, up to the first one that has no rule for them."""
    ops = _Ops()
    fake = FakeTensorMode(allow_non_fake_inputs=True)
    disabled = logging.root.manager.disable
    logging.disable(logging.CRITICAL)  # torch logs what has no rule as an error
    try:
        tensors = [*model.parameters(), *model.buffers()]
        twin = copy.deepcopy(model, {id(tensor): fake.from_tensor(tensor) for tensor in tensors})
        for path, module in twin.named_modules():
            module.register_forward_pre_hook(lambda *_, path=path: ops.modules.append(path))
            module.register_forward_hook(lambda *_: _drop(ops.modules))
        # What is compiled now would be found again by the capture (flex_attention compiles itself).
        with torch.no_grad(), fake, torch.compiler.set_stance("force_eager"):
            ids = _inputs_of(inputs, length)
            with ops:
                twin(*ids)
    except Exception:  # a model that cannot be copied or run without values: export will say what it has to say
        return ops
    finally:
        logging.disable(disabled)
    return ops


def _drop(modules: list[str]) -> None:
    modules.pop()  # and return nothing: what a hook returns would be taken for the module's output


def _inputs_of(inputs: tuple[Tensor, ...], length: int) -> list[Tensor]:
    positions = torch.arange(length, device=inputs[0].device).expand(2, length)
    return [torch.zeros_like(positions), positions][: len(inputs)]


def _wide_convolutions(first: _Ops, second: _Ops) -> Iterator[tuple[_Convolution, int]]:
    """Convolutions that are wider than one token, with their width."""
    # The shorter of two runs that were broken off is compared as far as it went.
    for short, long in zip(first.convolutions, second.convolutions, strict=False):
        for size, other, width in zip(short.sizes, long.sizes, short.kernel, strict=True):
            if size != other and width > 1:
                yield short, width


def _reads_neighbours(call: _Convolution, width: int) -> str:
    return f"{call.op} is a convolution over the tokens, {width} wide: it reads neighbouring positions"


def _convolution(first: _Ops, second: _Ops) -> str | None:
    return next((_reads_neighbours(*found) for found in _wide_convolutions(first, second)), None)


def _loop(first: _Ops, second: _Ops) -> str | None:
    growth = {name: count - first.counts[name] for name, count in second.counts.items()}
    name = max(growth, key=lambda name: growth[name])
    if growth[name] < LENGTHS[1] - LENGTHS[0]:
        return None
    return (
        f"it loops over the tokens, as a recurrence does: {name} is called {first.counts[name]} times for {LENGTHS[0]} "
        f"tokens and {second.counts[name]} times for {LENGTHS[1]}"
    )


def _choice(first: _Ops, second: _Ops) -> str | None:
    if len(first.choices) != len(second.choices):
        return None
    for (name, size), (_, other) in zip(first.choices, second.choices, strict=True):
        if size != other:
            return f"{name} chooses among the tokens by their values"
    return None
