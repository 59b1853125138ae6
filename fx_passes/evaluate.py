"""One way to run a piece of a graph, whatever its values are: real tensors, numbered entries, float64, or new nodes.

What differs from use to use is a :class:`Policy`: what stands for a node that nobody gave a value, and how an op is
called.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, MutableMapping
from dataclasses import dataclass
from typing import Any

import torch
from torch.fx import Node


def given_only(node: Node) -> Any:
    """For pieces whose every input is given."""
    raise KeyError(f"{node} was given no value")


def call_target(node: Node, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Run the op itself."""
    assert callable(node.target)
    return node.target(*args, **kwargs)


@dataclass(frozen=True)
class Policy:
    """How nodes are run.

    Attributes:
        other: the value of a node that has none so far.
        without: keyword arguments that are left out, such as a dtype where entries are numbered.
        changed: what takes the place of a keyword argument, by its name and value.
        call: runs one node on the values of its arguments.
    """

    other: Callable[[Node], Any] = given_only
    without: tuple[str, ...] = ()
    changed: Callable[[str, Any], Any] = lambda name, value: value
    call: Callable[[Node, tuple[Any, ...], dict[str, Any]], Any] = call_target


NUMBERED = Policy(without=("dtype", "device"))  # entries by their numbers: a move is the same in any dtype


def evaluate_node(node: Node, values: Mapping[Node, Any], policy: Policy) -> Any:
    """The value of one node, of those of its inputs."""

    def value_of(used: Node) -> Any:
        return values[used] if used in values else policy.other(used)

    args, kwargs = torch.fx.node.map_arg((node.args, dict(node.kwargs)), value_of)
    named = {name: policy.changed(name, value) for name, value in kwargs.items() if name not in policy.without}
    return policy.call(node, tuple(args), named)


def evaluate(nodes: Iterable[Node], values: MutableMapping[Node, Any], policy: Policy) -> None:
    """Add the values of nodes, in order, to those that are given."""
    for node in nodes:
        values[node] = evaluate_node(node, values, policy)
