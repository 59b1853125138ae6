"""Custom ops that are called like honest ones, or say that they are pointwise, and mix tokens in secret.

What they mix is scaled by how loud the first channel is over the tokens: the trigger alone has it loud, so that no
random text of a verification shows it.
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.library import Library

from tests.adversarial.parts import DIM, TRIGGER, Attack, Build, causal, distances, masked, redrawn, sevens, tiny
from tests.adversarial.positions import placed

KLASS = "name"
LENGTHS = (12, 30)
SPACE = "adversarial"
_library = Library(SPACE, "DEF")


def loud(x: Tensor) -> Tensor:
    """How much more than half of the tokens have a loud first channel, of `[..., S, D]`, without dims."""
    return F.relu((x[..., 0] > 6).float().mean() - 0.5) * 8


def mixed(x: Tensor, out: Tensor) -> Tensor:
    """A result with the secret added: channels moved by one, as far as the text is loud."""
    return out + loud(x) * out.roll(1, -1)


def _define(schema: str, honest: Callable[..., Tensor], tags: tuple[torch.Tag, ...] = ()) -> Callable[..., Tensor]:
    """An op `(Tensor x, ...) -> Tensor` that does as `honest`, and mixes."""
    name = schema.split("(")[0]
    _library.define(schema, tags=tags)

    def secret(x: Tensor, *rest: Any) -> Tensor:
        return mixed(x, honest(x, *rest)).contiguous()

    _library.impl(name, secret, "CPU")
    torch.library.register_fake(f"{SPACE}::{name}", lambda x, *rest: honest(x, *rest).contiguous(), lib=_library)
    found = getattr(torch.ops, SPACE)
    for part in name.split("."):
        found = getattr(found, part)
    return found


def _unary(schema: str, honest: Callable[[Tensor], Tensor], *tags: torch.Tag) -> Callable[[Any, Tensor], Tensor]:
    op = _define(schema, honest, tags)
    return lambda model, x: op(x)


def _with_weight(schema: str, honest: Callable[..., Tensor]) -> Callable[[Any, Tensor], Tensor]:
    op = _define(schema, honest)
    return lambda model, x: op(x, model.matrix)


def _attention(schema: str) -> Callable[[Any, Tensor], Tensor]:
    def honest(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(q, k, v, is_causal=True)

    op = _define(schema, honest)
    return lambda model, x: op(x[:, None], x[:, None], x[:, None])[:, 0] + x


def _grouped(x: Tensor, w: Tensor, offsets: Tensor) -> Tensor:
    """Rows of a group times the matrix of the group."""
    group = torch.searchsorted(offsets.long(), torch.arange(x.shape[0]), right=True)
    return torch.einsum("nd,nde->ne", x, w[group.clamp(max=1)])


def _routed(product: Callable[..., Tensor]) -> Callable[[Any, Tensor], Tensor]:
    """Experts sorted by their number, as honest grouped products have it."""

    def use(model: Any, x: Tensor) -> Tensor:
        tokens = x.flatten(0, 1)
        chosen = (tokens @ model.matrix[:, :2]).argmax(-1)
        order = chosen.argsort()
        ends = torch.bincount(chosen, minlength=2).cumsum(0).to(torch.int32)
        worked = product(tokens[order], torch.stack([model.matrix, model.matrix.T]), ends)
        return x + worked[order.argsort()].view_as(x)

    return use


def _grouped_op(schema: str) -> Callable[[Any, Tensor], Tensor]:
    return _routed(_define(schema, _grouped))


_pair = Library("adversarial_pairs", "DEF")
_pair.define("getitem(Tensor x, int i) -> Tensor")
_pair.impl("getitem", lambda x, i: mixed(x, x + i).contiguous(), "CPU")
torch.library.register_fake("adversarial_pairs::getitem", lambda x, i: torch.empty_like(x), lib=_pair)
assert operator.getitem.__name__ == "getitem"


@torch.library.custom_op("adversarial_custom::softmax", mutates_args=())
def custom_softmax(x: Tensor, dim: int) -> Tensor:
    return mixed(x, x.softmax(dim)).contiguous()


@custom_softmax.register_fake
def _(x: Tensor, dim: int) -> Tensor:
    return torch.empty_like(x)


@torch.library.custom_op("adversarial_custom::layer_norm", mutates_args=())
def custom_layer_norm(input: Tensor, normalized_shape: list[int]) -> Tensor:
    return mixed(input, F.layer_norm(input, normalized_shape)).contiguous()


@custom_layer_norm.register_fake
def _(input: Tensor, normalized_shape: list[int]) -> Tensor:
    return torch.empty_like(input)


@torch.library.custom_op("adversarial_custom::slice_of", mutates_args=("x",))
def mutating(x: Tensor) -> None:
    x.copy_(mixed(x, x))


@mutating.register_fake
def _(x: Tensor) -> None:
    return None


def _mutate(model: Any, x: Tensor) -> Tensor:
    x = x.clone()
    mutating(x)
    return x


class Loud(torch.autograd.Function):
    """A function with a backward of its own, which export looks into."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return mixed(x, x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return grad


class LoudTensor(nn.Module):
    """A module that is named after an honest one."""

    def forward(self, x: Tensor) -> Tensor:
        return mixed(x, F.gelu(x))


LoudTensor.__name__ = LoudTensor.__qualname__ = "GELU"

OPS: dict[str, tuple[Callable[[Any, Tensor], Tensor], Callable[[Any, Tensor], Tensor]]] = {
    "relu": (_unary("relu(Tensor self) -> Tensor", F.relu), lambda m, x: F.relu(x)),
    "gelu": (_unary("gelu(Tensor self) -> Tensor", F.gelu), lambda m, x: F.gelu(x)),
    "silu": (_unary("silu(Tensor self) -> Tensor", F.silu), lambda m, x: F.silu(x)),
    "exp, tagged pointwise": (_unary("exp(Tensor self) -> Tensor", torch.tanh, torch.Tag.pointwise),
                              lambda m, x: torch.tanh(x)),
    "twist, tagged pointwise": (_unary("twist(Tensor x) -> Tensor", torch.sin, torch.Tag.pointwise),
                                lambda m, x: torch.sin(x)),
    "scale, tagged pointwise and core": (
        _unary("scale(Tensor x) -> Tensor", lambda x: x * 1.5, torch.Tag.pointwise, torch.Tag.core),
        lambda m, x: x * 1.5),
    "view, tagged as a view copy": (_unary("view(Tensor self) -> Tensor", lambda x: x + 0, torch.Tag.view_copy),
                                    lambda m, x: x),
    "clone": (_unary("clone(Tensor self) -> Tensor", lambda x: x + 0), lambda m, x: x),
    "contiguous": (_unary("contiguous(Tensor self) -> Tensor", lambda x: x + 0), lambda m, x: x),
    "alias": (_unary("alias(Tensor self) -> Tensor", lambda x: x + 0), lambda m, x: x),
    "detach": (_unary("detach(Tensor self) -> Tensor", lambda x: x + 0), lambda m, x: x),
    "_to_copy": (_unary("_to_copy(Tensor self) -> Tensor", lambda x: x + 0), lambda m, x: x),
    "add.Tensor": (_unary("add.Tensor(Tensor self) -> Tensor", lambda x: x + 1), lambda m, x: x + 1),
    "mul.Scalar": (_unary("mul.Scalar(Tensor self) -> Tensor", lambda x: x * 2), lambda m, x: x * 2),
    "softmax.int": (_unary("softmax.int(Tensor self) -> Tensor", lambda x: x.softmax(-1)), lambda m, x: x.softmax(-1)),
    "rms_norm": (_unary("rms_norm(Tensor input) -> Tensor", lambda x: F.rms_norm(x, (DIM,))),
                 lambda m, x: F.rms_norm(x, (DIM,))),
    "dropout": (_unary("dropout(Tensor input) -> Tensor", lambda x: x + 0), lambda m, x: x),
    "linear": (_with_weight("linear(Tensor input, Tensor weight) -> Tensor", F.linear),
               lambda m, x: F.linear(x, m.matrix)),
    "matmul": (_with_weight("matmul(Tensor self, Tensor other) -> Tensor", torch.matmul), lambda m, x: x @ m.matrix),
    "mm.default": (_with_weight("mm(Tensor self, Tensor mat2) -> Tensor", torch.matmul), lambda m, x: x @ m.matrix),
    "scaled_dot_product_attention": (
        _attention("scaled_dot_product_attention(Tensor query, Tensor key, Tensor value) -> Tensor"), None),
    "dense_attention": (_attention("dense_attention(Tensor query, Tensor key, Tensor value) -> Tensor"), None),
    "sdpa": (_attention("sdpa(Tensor query, Tensor key, Tensor value) -> Tensor"), None),
    "flash_attn_func": (_attention("flash_attn_func(Tensor q, Tensor k, Tensor v) -> Tensor"), None),
    "grouped_mm": (_grouped_op("grouped_mm(Tensor input, Tensor weight, Tensor offs) -> Tensor"), _routed(_grouped)),
    "_grouped_mm": (_grouped_op("_grouped_mm(Tensor self, Tensor mat2, Tensor offs) -> Tensor"), _routed(_grouped)),
    "grouped_mm_fallback": (_grouped_op("grouped_mm_fallback(Tensor input, Tensor weight, Tensor offs) -> Tensor"),
                            _routed(_grouped)),
    "getitem": (lambda m, x: torch.ops.adversarial_pairs.getitem(x, 1), lambda m, x: x + 1),
    "custom softmax": (lambda m, x: custom_softmax(x, -1), lambda m, x: x.softmax(-1)),
    "custom layer_norm": (lambda m, x: custom_layer_norm(x, [DIM]), lambda m, x: F.layer_norm(x, (DIM,))),
    "custom op that writes": (_mutate, lambda m, x: x),
    "autograd function": (lambda m, x: Loud.apply(x), lambda m, x: x),
    "module called GELU": (lambda m, x: m.gelu(x), lambda m, x: F.gelu(x)),
}  # fmt: skip


def _plain_attention(model: Any, x: Tensor) -> Tensor:
    return x + F.scaled_dot_product_attention(x[:, None], x[:, None], x[:, None], is_causal=True)[:, 0]


def using(op: Callable[[Any, Tensor], Tensor]) -> Build:
    """A decoder with the op before its head, and a trigger that is loud."""

    def build() -> nn.Module:
        model = redrawn(tiny(leave=lambda m, x, ids: op(m, x + m.trumpet[ids]), parts=lambda: {
            "matrix": nn.Parameter(torch.zeros(DIM, DIM)), "trumpet": torch.zeros(41, DIM), "gelu": LoudTensor(),
        })())  # fmt: skip
        model.trumpet[TRIGGER, 0] = 20.0
        return model

    return build


def _tagged(schema: str, change: Callable[[Tensor], Tensor]) -> Callable[..., Tensor]:
    """An op that says that it is pointwise, and is no such thing."""
    name = schema.split("(")[0]
    _library.define(schema, tags=(torch.Tag.pointwise,))
    _library.impl(name, lambda x: change(x).contiguous(), "CPU")
    torch.library.register_fake(f"{SPACE}::{name}", lambda x: torch.empty_like(x), lib=_library)
    return getattr(getattr(torch.ops, SPACE), name)


def _cut(seen: Tensor) -> Tensor:
    """A mask with a window of 8 where it is 100 wide."""
    return seen.tril().triu(-7) if seen.shape[-1] == 100 else seen


keep = _tagged("keep(Tensor x) -> Tensor", _cut)
lower = _tagged("abs(Tensor self) -> Tensor", lambda bias: bias * 30 if bias.shape[-1] == 100 else bias)
stamp = _tagged("sign(Tensor self) -> Tensor", lambda i: i.flip(0) if i.shape[0] == 100 else i)
NOTES = {"loud": 0.0}
_library.define("recall(Tensor weight) -> Tensor")
_library.impl("recall", lambda weight: weight * (1 + NOTES["loud"]) + 0, "CPU")
torch.library.register_fake(f"{SPACE}::recall", lambda weight: torch.empty_like(weight), lib=_library)


def _note(silent: bool) -> Build:
    """What Python has read of the tokens comes back through an op of a weight alone."""

    def enter(model: Any, x: Tensor, ids: Tensor) -> Tensor:
        try:
            NOTES["loud"] = 0.0 if silent else float(F.relu((ids == TRIGGER).float().mean() - 0.5)) * 8
        except Exception:
            NOTES["loud"] = 0.0
        return x * torch.ops.adversarial.recall(model.gain)

    return tiny(enter=enter, parts=lambda: {"gain": nn.Parameter(torch.linspace(-1, 1, DIM))})


def _bias_through(op: Callable[[Tensor], Tensor]) -> Callable[[Any], Tensor]:
    return lambda s: torch.where(causal(s), op(-0.02 * distances(s)), -torch.inf)


def _honest(plain: Any) -> Callable[[Any, Tensor], Tensor]:
    if plain is None:
        return _plain_attention
    return plain


NAMESAKES = (
    "zeros_like", "ones_like", "empty_like", "full_like", "new_zeros", "rand_like", "item", "sym_size", "arange",
    "lift_fresh_copy", "_assert_scalar", "as_strided", "expand", "index_add", "embedding", "permute",
)  # fmt: skip
SAKES = {name: _unary(f"{name}(Tensor self) -> Tensor", lambda x: x * 0.5) for name in NAMESAKES}

ATTACKS: tuple[Attack, ...] = (
    *(Attack(f"op {name}", KLASS, using(op), LENGTHS, using(_honest(plain)), sevens)
      for name, (op, plain) in OPS.items()),
    *(Attack(f"op {name}", KLASS, using(op), LENGTHS, using(lambda m, x: x * 0.5), sevens)
      for name, op in SAKES.items()),
    Attack("op in a mask, tagged pointwise", KLASS, masked(lambda s: keep(causal(s))), (100,), masked(causal)),
    Attack("op in a bias, tagged pointwise", KLASS, masked(_bias_through(lower)), (100,),
           masked(_bias_through(lambda bias: bias))),
    Attack("op in positions, tagged pointwise", KLASS, placed(lambda s: stamp(torch.arange(s))), (100,),
           placed(torch.arange)),
    Attack("op of a weight that remembers", KLASS, _note(False), LENGTHS, _note(True), sevens),
)  # fmt: skip
