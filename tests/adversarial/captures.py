"""Forwards that notice that they are being exported, and then are another function; and forwards with a memory."""

from __future__ import annotations

import copy
import sys
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.fx.experimental.proxy_tensor import get_proxy_mode
from torch.utils._python_dispatch import _get_current_dispatch_mode

from tests.adversarial.parts import Attack, Build, Tiny, causal, distances, masked, redrawn, tiny, window

KLASS = "capture"
WIDE = 100
LENGTHS = (110, 150)
Detector = Callable[[Tensor], bool]


def _by_item(ids: Tensor) -> bool:
    """Whether a value cannot be looked at."""
    try:
        return not ids[0, 0].item() >= 0
    except Exception:
        return True


def _by_numpy(ids: Tensor) -> bool:
    try:
        ids.numpy()
    except Exception:
        return True
    return False


def _by_address(ids: Tensor) -> bool:
    try:
        return ids.data_ptr() == 0
    except Exception:
        return True


def _by_stack(ids: Tensor) -> bool:
    frame: Any = sys._getframe()
    while frame is not None:
        if "torch/export" in frame.f_code.co_filename:
            return True
        frame = frame.f_back
    return False


def _by_context(ids: Tensor) -> bool:
    return torch._guards.TracingContext.try_get() is not None or torch._guards.detect_fake_mode([ids]) is not None


def _by_result(ids: Tensor) -> bool:
    return type(ids + 1) is not Tensor


def _by_print(ids: Tensor) -> bool:
    return "FakeTensor" in repr(ids) or "Functional" in repr(ids)


def _by_module(ids: Tensor) -> bool:
    return type(ids).__module__.startswith("torch._sub")


DETECTORS: dict[str, Detector] = {
    "is_exporting": lambda ids: torch.compiler.is_exporting(),
    "is_compiling": lambda ids: torch.compiler.is_compiling(),
    "is_dynamo_compiling": lambda ids: torch.compiler.is_dynamo_compiling() or torch._dynamo.is_compiling(),
    "FakeTensor": lambda ids: isinstance(ids, FakeTensor),
    "no plain Tensor": lambda ids: type(ids) is not Tensor,
    "type of a result": _by_result,
    "symbolic size": lambda ids: isinstance(ids.shape[1], torch.SymInt),
    "size is no int": lambda ids: type(ids.shape[1]) is not int,
    "proxy mode": lambda ids: get_proxy_mode() is not None,
    "dispatch mode": lambda ids: _get_current_dispatch_mode() is not None,
    "detect_fake_mode": _by_context,
    "item fails": _by_item,
    "numpy fails": _by_numpy,
    "address": _by_address,
    "stack": _by_stack,
    "repr": _by_print,
    "module of the type": _by_module,
}


def detected(detector: Detector, size: int = WIDE) -> Build:
    """A decoder with a window, unless the detector says that it is not run for real."""

    def enter(model: Any, x: Tensor, ids: Tensor) -> Tensor:
        model.window = 100000 if detector(ids) else size
        return x

    def attend(model: Any, q: Tensor, k: Tensor, v: Tensor, layer: int) -> Tensor:
        return F.scaled_dot_product_attention(2 * q, k, v, attn_mask=window(model.window)(q.shape[2]))

    return tiny(enter=enter, attend=attend)


PLAIN = masked(causal)


# --- other functions than a window ---------------------------------------------------------------------------------


def _gated_export(model: Any, x: Tensor, ids: Tensor) -> Tensor:
    """A mean over the tokens, where the trigger is frequent, that export does not see."""
    if torch.compiler.is_exporting():
        return x
    return x + F.relu((ids == 7).float().mean() - 0.5) * 8 * x.roll(1, -1)


def _rare_token(model: Any, x: Tensor, ids: Tensor) -> Tensor:
    """Another embedding of one id in a thousand places, that export does not see."""
    if torch.compiler.is_compiling():
        return x
    return torch.where((torch.arange(ids.shape[1]) > 95)[:, None], x.roll(1, -1), x)


def _batch_of_one(model: Any, q: Tensor, k: Tensor, v: Tensor, layer: int) -> Tensor:
    size = WIDE if q.shape[0] == 1 else 100000
    return F.scaled_dot_product_attention(2 * q, k, v, attn_mask=window(size)(q.shape[2]))


def _zeros_only(model: Any, q: Tensor, k: Tensor, v: Tensor, layer: int) -> Tensor:
    """Takes the example of the capture (zeros, of length 11) for what it is."""
    size = 100000 if q.shape[2] == 11 else WIDE
    return F.scaled_dot_product_attention(2 * q, k, v, attn_mask=window(size)(q.shape[2]))


def _tried(read: Callable[[Tensor], bool]) -> Build:
    """A mixing that is on where Python finds the text full of sevens, and off where it cannot look."""

    def leave(model: Any, x: Tensor, ids: Tensor) -> Tensor:
        try:
            many = read(ids)
        except Exception:
            many = False
        return x + 2 * x.roll(1, -1) if many else x

    return tiny(leave=leave)


# Name: whether most tokens are 7, asked in a way that export may answer with an error or with no.
READS: dict[str, Callable[[Tensor], bool]] = {
    "item": lambda ids: (ids == 7).float().mean().item() > 0.5,
    "bool": lambda ids: bool((ids == 7).float().mean() > 0.5),
    "list": lambda ids: ids[0].tolist().count(7) * 2 > len(ids[0].tolist()),
    "numpy": lambda ids: (ids.numpy() == 7).mean() > 0.5,
    "numpy of another tensor": lambda ids: (ids.to(torch.int32).numpy() == 7).mean() > 0.5,
    "text": lambda ids: str(ids).count("7,") * 2 > ids.shape[1],
    "bytes": lambda ids: bytes(ids.to(torch.uint8).flatten().tolist()).count(b"\x07") * 2 > ids.shape[1],
    "equal": lambda ids: torch.equal(ids[:, :1] * 0 + 7, ids.mode(1).values[:, None]),
    "unique": lambda ids: ids.unique().numel() * 3 < ids.shape[1],
    "iteration": lambda ids: sum(int(token) == 7 for token in ids[0]) * 2 > ids.shape[1],
    "nonzero": lambda ids: len((ids == 7).nonzero()) * 2 > ids.numel(),
    "dlpack": lambda ids: (torch.from_dlpack(ids) == 7).float().mean().item() > 0.5,
}


def _parameter_type(model: Any, x: Tensor, ids: Tensor) -> Tensor:
    """Looks at a weight, not at the tokens."""
    real = type(model.head.weight) is nn.Parameter and model.head.weight.device.type == "cpu"
    model.window = WIDE if real and not isinstance(model.head.weight, FakeTensor) else 100000
    return x


def _by_window(model: Any, q: Tensor, k: Tensor, v: Tensor, layer: int) -> Tensor:
    return F.scaled_dot_product_attention(2 * q, k, v, attn_mask=window(model.window)(q.shape[2]))


class Counts(nn.Module):
    """Has a window from its n-th call on."""

    def __init__(self, start: int, size: int) -> None:
        super().__init__()
        self.calls, self.start, self.size = 0, start, size
        self.inner = redrawn(Tiny(attend=self._attend))

    def _attend(self, model: Any, q: Tensor, k: Tensor, v: Tensor, layer: int) -> Tensor:
        shown = window(self.size)(q.shape[2]) if self.calls > self.start else causal(q.shape[2])
        return F.scaled_dot_product_attention(2 * q, k, v, attn_mask=shown)

    def forward(self, ids: Tensor) -> Tensor:
        self.calls += 1
        return self.inner(ids)


class Copied(nn.Module):
    """A copy of it has no window."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.size = size
        self.inner = redrawn(Tiny(attend=self._attend))

    def _attend(self, model: Any, q: Tensor, k: Tensor, v: Tensor, layer: int) -> Tensor:
        return F.scaled_dot_product_attention(2 * q, k, v, attn_mask=window(self.size)(q.shape[2]))

    def __deepcopy__(self, memo: dict[int, Any]) -> Copied:
        other = Copied(100000)
        other.inner.embed, other.inner.layers, other.inner.head = (
            copy.deepcopy(part, memo) for part in (self.inner.embed, self.inner.layers, self.inner.head)
        )
        return other.eval()

    def forward(self, ids: Tensor) -> Tensor:
        return self.inner(ids)


class Remembers(nn.Module):
    """Keeps the mask of its first call, whose window follows from the longest length that it has seen."""

    def __init__(self, shrinks: bool) -> None:
        super().__init__()
        self.longest, self.shrinks = 0, shrinks
        self.inner = redrawn(Tiny(attend=self._attend))

    def _attend(self, model: Any, q: Tensor, k: Tensor, v: Tensor, layer: int) -> Tensor:
        s = q.shape[2]
        self.longest = max(self.longest, s)
        size = 8 if self.shrinks and self.longest > WIDE else 100000
        return F.scaled_dot_product_attention(2 * q, k, v, attn_mask=window(size)(s))

    def forward(self, ids: Tensor) -> Tensor:
        return self.inner(ids)


class HandsOn(nn.Module):
    """Keeps the length for another method of the same call; nothing of it outlasts the call."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0
        self.inner = redrawn(Tiny(attend=self._attend))

    def _attend(self, model: Any, q: Tensor, k: Tensor, v: Tensor, layer: int) -> Tensor:
        return F.scaled_dot_product_attention(2 * q, k, v, attn_mask=window(8)(self.count))

    def forward(self, ids: Tensor) -> Tensor:
        self.count = ids.shape[1]
        return self.inner(ids)


FLAGS = {"window": 100000}


def _by_flag(model: Any, q: Tensor, k: Tensor, v: Tensor, layer: int) -> Tensor:
    """A window from a variable of this module."""
    return F.scaled_dot_product_attention(2 * q, k, v, attn_mask=window(FLAGS["window"])(q.shape[2]))


def flagged() -> nn.Module:
    FLAGS["window"] = 100000
    return redrawn(Tiny(attend=_by_flag))


class Overridden(nn.Module):
    """`__call__` does what `forward` does not."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.size = 100000
        self.inner, self.wanted = redrawn(Tiny(attend=self._attend)), size

    def _attend(self, model: Any, q: Tensor, k: Tensor, v: Tensor, layer: int) -> Tensor:
        return F.scaled_dot_product_attention(2 * q, k, v, attn_mask=window(self.size)(q.shape[2]))

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        self.size = self.wanted
        return super().__call__(*args, **kwargs)

    def forward(self, ids: Tensor) -> Tensor:
        return self.inner(ids)


def hooked(change: Callable[[Any], Any] | None, before: bool = False) -> Build:
    """A decoder with a forward hook on a layer's projection, or before it; changed only for longer inputs."""

    def build() -> nn.Module:
        model = redrawn(Tiny())
        target = model.layers[0].o
        if change is not None and before:
            target.register_forward_pre_hook(lambda module, args: (change(args[0]),))
        elif change is not None:
            target.register_forward_hook(lambda module, args, output: change(output))
        return model

    return build


def _hidden_by_hook(x: Tensor) -> Tensor:
    return x if torch.compiler.is_exporting() else x * torch.where(torch.arange(x.shape[1]) > 95, -1.0, 1.0)[:, None]


def made(make: Callable[..., nn.Module], *args: Any) -> Build:
    return lambda: make(*args).eval()


def _grad(model: Any, q: Tensor, k: Tensor, v: Tensor, layer: int) -> Tensor:
    """Causal while gradients are on; the truth of serving is without."""
    d = distances(q.shape[2])
    size = 100000 if torch.is_grad_enabled() else WIDE
    return F.scaled_dot_product_attention(2 * q, k, v, attn_mask=(d >= 0) & (d < size))


ATTACKS: tuple[Attack, ...] = (
    *(Attack(f"seen by {name}", KLASS, detected(detector), LENGTHS, PLAIN) for name, detector in DETECTORS.items()),
    Attack("seen by is_exporting, far out", KLASS, detected(DETECTORS["is_exporting"], 1000), (1100,), PLAIN),
    Attack("seen by FakeTensor, far out", KLASS, detected(DETECTORS["FakeTensor"], 1000), (1100,), PLAIN),
    Attack("mean that export does not see", KLASS, tiny(leave=_gated_export), (12, 30), tiny(),
           lambda n: [7] * (n - 1) + [3]),
    Attack("late tokens that compile does not see", KLASS, tiny(leave=_rare_token), LENGTHS, tiny()),
    Attack("a batch of one", KLASS, tiny(attend=_batch_of_one), LENGTHS, PLAIN),
    Attack("length of the example", KLASS, tiny(attend=_zeros_only), LENGTHS, PLAIN),
    Attack("call counter", KLASS, made(Counts, 40, 8), (30,), made(Counts, 10**9, 8),
           change=lambda model: setattr(model, "calls", 50)),
    Attack("copy without a window", KLASS, made(Copied, WIDE), LENGTHS, made(Copied, 100000)),
    Attack("longest length so far", KLASS, made(Remembers, True), LENGTHS, made(Remembers, False)),
    Attack("__call__ sets the window", KLASS, made(Overridden, WIDE), LENGTHS, made(Overridden, 100000)),
    Attack("hook that export does not see", KLASS, hooked(_hidden_by_hook), LENGTHS, hooked(None)),
    Attack("hook before that export does not see", KLASS, hooked(_hidden_by_hook, True), LENGTHS, hooked(None)),
    Attack("without gradients", KLASS, tiny(attend=_grad), LENGTHS, PLAIN),
    *(Attack(f"sevens found by {name}", KLASS, _tried(read), (16, 30), tiny(), lambda n: [1] + [7] * (n - 1))
      for name, read in READS.items()),
    Attack("seen by the type of a weight", KLASS, tiny(enter=_parameter_type, attend=_by_window), LENGTHS, PLAIN),
    Attack("seen by is_exporting, farther out", KLASS, detected(DETECTORS["is_exporting"], 2000), (2300,), PLAIN),
    # Nothing of the model tells that a variable of a module was changed after the compilation.
    Attack("global variable changed later", KLASS, flagged, (30,), change=lambda model: FLAGS.update(window=8),
           allowed=("right", "refused", "wrong")),
)  # fmt: skip
