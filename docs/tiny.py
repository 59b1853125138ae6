"""The decoder that the pages of this folder rewrite, and how they print its graph.

The examples run in this folder: ``cd docs``, then ``python``.
"""

from __future__ import annotations

import sympy
import torch
from torch import Tensor, nn
from torch.fx import Node
from torch.fx.node import map_arg

import kvpass  # noqa: F401 - registers the kvpass:: ops
from kvpass.fx_passes.capture.capture import EXAMPLE_BATCH, EXAMPLE_LENGTH, capture
from kvpass.fx_passes.graph import CapturedGraph, expression, module_path, shape_of, tensor_value


class Attention(nn.Module):
    """Two query heads of width 4 over one head of keys and values, masked by a tril."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v, self.out = (nn.Linear(8, width, bias=False) for width in (8, 4, 4, 8))

    def forward(self, x: Tensor) -> Tensor:
        batch, length, _ = x.shape
        q = self.q(x).view(batch, length, 2, 4).transpose(1, 2)
        k = self.k(x).view(batch, length, 1, 4).transpose(1, 2).repeat_interleave(2, dim=1)
        v = self.v(x).view(batch, length, 1, 4).transpose(1, 2).repeat_interleave(2, dim=1)
        scores = q @ k.transpose(-2, -1) / 2
        hidden = ~torch.tril(torch.ones(length, length, dtype=torch.bool))
        weights = scores.masked_fill(hidden, float("-inf")).softmax(-1)
        return self.out((weights @ v).transpose(1, 2).reshape(batch, length, 8))


class TinyDecoder(nn.Module):
    """One layer, 16 token ids, at most 64 positions."""

    def __init__(self) -> None:
        super().__init__()
        self.tokens, self.positions = nn.Embedding(16, 8), nn.Embedding(64, 8)
        self.attention, self.head = Attention(), nn.Linear(8, 16, bias=False)

    def forward(self, input_ids: Tensor) -> Tensor:
        x = self.tokens(input_ids) + self.positions(torch.arange(input_ids.shape[1]))
        return self.head(x + self.attention(x))


def captured(model: nn.Module | None = None) -> CapturedGraph:
    """The graph of a model as it is captured, before any pass."""
    torch.manual_seed(0)
    model = (TinyDecoder() if model is None else model).eval()
    return capture(model, (torch.zeros(EXAMPLE_BATCH, EXAMPLE_LENGTH, dtype=torch.int64),))


def show(graph: CapturedGraph, module: str = "") -> None:
    """Print the calls of a graph, or those made by one module: name, op, operands, shape (b batch, s length)."""
    for node in graph.graph.nodes:
        if node.op == "call_function" and module_path(node, graph).startswith(module) and not is_size(node):
            print(f"{node.name:<24} {call(graph, node)}{shape(graph, node)}")


def is_size(node: Node) -> bool:
    """Whether a node is a number, such as the batch size."""
    return isinstance(node.meta.get("val"), (int, torch.SymInt))


def call(graph: CapturedGraph, node: Node) -> str:
    """Op and operands; sizes by their letter."""
    packet = getattr(node.target, "overloadpacket", node.target)
    name = getattr(packet, "_qualified_op_name", "").removeprefix("aten::") or packet.__name__
    args = map_arg(node.args, lambda n: letters(graph, n.meta["val"]) if is_size(n) else n)
    kwargs = {key: value for key, value in node.kwargs.items() if key not in ("device", "pin_memory")}
    operands = [*(str(a) for a in args), *(f"{key}={value}" for key, value in kwargs.items())]
    return f"{name}({', '.join(operands)})".replace("torch.", "")


def shape(graph: CapturedGraph, node: Node) -> str:
    """The shape of a tensor; nothing for what is none."""
    if tensor_value(node) is None:
        return ""
    return f"  [{', '.join(str(letters(graph, size)) for size in shape_of(node))}]"


def letters(graph: CapturedGraph, size: object) -> sympy.Expr:
    """A size in b and s."""
    return expression(size).subs({graph.batch: sympy.Symbol("b"), graph.length: sympy.Symbol("s")})
