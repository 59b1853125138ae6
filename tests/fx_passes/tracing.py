"""How the tests of the passes capture small modules, print graphs, and name the axes of a node."""

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import Node

from kvpass.fx_passes.capture.capture import EXAMPLE_BATCH, EXAMPLE_LENGTH, capture
from kvpass.fx_passes.graph import CapturedGraph
from kvpass.fx_passes.token_axis.axes import Axes, Kind

VOCAB = 31
EXAMPLE = torch.zeros(EXAMPLE_BATCH, EXAMPLE_LENGTH, dtype=torch.int64)


def captured(model: nn.Module, *, position_ids: bool = False) -> CapturedGraph:
    """Capture a module that takes token ids `[B, S]`, and position ids of that shape when asked to."""
    positions = torch.arange(EXAMPLE_LENGTH).repeat(EXAMPLE_BATCH, 1)
    with torch.no_grad():
        return capture(model.eval(), (EXAMPLE, positions) if position_ids else (EXAMPLE,))


class Cases(nn.Module):
    """Runs many functions of the embedded tokens in one forward, so that they share one capture.

    Attributes:
        embed: float64, so that a difference of 1e-9 is one.
        functions: each takes this module and `x [B, S, width]`.
    """

    def __init__(self, functions: dict[str, Callable[["Cases", Tensor], Tensor]], width: int = 6) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)

        def draw(*shape: int) -> Tensor:
            return torch.randn(shape, generator=generator, dtype=torch.float64)

        self.embed = nn.Parameter(draw(VOCAB, width))
        self.square = nn.Parameter(draw(width, width))
        self.vector = nn.Parameter(draw(width))
        self.experts = nn.Parameter(draw(4, width, width))
        self.wide = nn.Parameter(draw(4, 8, 8))
        self.register_buffer("table", draw(64, width))
        self.functions = functions

    def forward(self, ids: Tensor) -> tuple[Tensor, ...]:
        x = nn.functional.embedding(ids, self.embed)
        return (x, *(function(self, x) for function in self.functions.values()))


def outputs(graph: CapturedGraph) -> list[Node]:
    """Nodes that a captured forward returns."""
    (result,) = next(n for n in reversed(graph.graph.nodes) if n.op == "output").args
    return list(result)  # type: ignore[arg-type]


def show(axes: Axes) -> str:
    """Axes as `B S 6`; factors of one dim are joined by `*`, and a dim of size 1 is `1`."""
    letters = {Kind.BATCH: "B", Kind.TOKEN: "S", Kind.LEFT: "L", Kind.RIGHT: "R", Kind.PICKED: "P", Kind.ANY: "any"}
    return " ".join("*".join(letters.get(f.kind, str(f.size)) for f in dim) or "1" for dim in axes)


def graph_text(graph: CapturedGraph | torch.fx.GraphModule) -> str:
    """One line per node, `name = op(arguments)`; floats short, and nothing that changes from run to run."""
    lines: list[str] = []
    for node in graph.graph.nodes:
        if node.op == "placeholder":
            lines.append(f"{node.name} = input")
        elif node.op == "get_attr":
            lines.append(f"{node.name} = self.{node.target}")
        elif node.op == "output":
            lines.append(f"return {_argument(node.args[0])}")
        else:
            named = [f"{k}={_argument(v)}" for k, v in node.kwargs.items()]
            name = str(node.target) if node.op == "call_function" and "." in str(node.target) else _plain_name(node)
            lines.append(f"{node.name} = {name}({', '.join([*map(_argument, node.args), *named])})")
    return "\n".join(lines) + "\n"


def _plain_name(node: Node) -> str:
    return getattr(node.target, "__name__", str(node.target))


def _argument(value: Any) -> str:
    if isinstance(value, (list, tuple)):
        return f"[{', '.join(map(_argument, value))}]"
    if isinstance(value, float):
        return f"{value:.6g}"
    return "end" if value == 2**63 - 1 else str(value)


def compare_golden(name: str, text: str) -> None:
    """Compare with `golden/<name>.txt`, or write it when KVPASS_REWRITE_GOLDEN is set."""
    path = Path(__file__).with_name("golden") / f"{name}.txt"
    if os.environ.get("KVPASS_REWRITE_GOLDEN"):
        path.parent.mkdir(exist_ok=True)
        path.write_text(text)
    assert text == path.read_text(), f"{path.name} differs; KVPASS_REWRITE_GOLDEN=1 writes it anew"
