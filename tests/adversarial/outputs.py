"""Models that return more than logits: the logits are served, or nothing is."""

from __future__ import annotations

from collections import OrderedDict, namedtuple
from collections.abc import Callable
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

from tests.adversarial.parts import DIM, VOCAB, Attack, Build, Tiny, redrawn

KLASS = "output"
LENGTHS = (9, 30)


class Returns(nn.Module):
    """A decoder that puts its results in a form of its own.

    Args:
        form: of hidden states `[B, S, W]` and logits `[B, S, V]`.
        width: of the hidden states that are returned.
    """

    def __init__(self, form: Callable[[Tensor, Tensor], Any], width: int = VOCAB) -> None:
        super().__init__()
        self.inner = Tiny(leave=self._keep)
        self.form, self.wide, self.kept = form, nn.Linear(DIM, width), []

    def _keep(self, model: Any, x: Tensor, ids: Tensor) -> Tensor:
        self.kept = [x]
        return x

    def forward(self, input_ids: Tensor) -> Any:
        logits = self.inner(input_ids)
        hidden = self.wide(self.kept.pop())
        return self.form(hidden, logits)


@dataclass
class Output:
    hidden: Tensor
    logits: Tensor


@dataclass
class ScoresOutput:
    hidden: Tensor
    scores: Tensor


class Registered(OrderedDict):  # type: ignore[type-arg]
    """As transformers' outputs: keys that are attributes, and an order of their own."""

    def __getattr__(self, name: str) -> Any:
        return self[name]


Pair = namedtuple("Pair", ["hidden", "logits"])
Misnamed = namedtuple("Misnamed", ["logits", "scores"])


def returning(form: Callable[[Tensor, Tensor], Any], width: int = VOCAB) -> Build:
    return lambda: redrawn(Returns(form, width))


def second(output: Any) -> Tensor:
    return output[1]


# Name: form, width of the hidden states, how the logits are taken, what a tool may take instead.
FORMS: dict[str, tuple[Callable[[Tensor, Tensor], Any], int, Callable[[Any], Tensor]]] = {
    "hidden, logits": (lambda h, y: (h, y), DIM, second),
    "hidden as wide, logits": (lambda h, y: (h, y), VOCAB, second),
    "list of hidden, logits": (lambda h, y: [h, y], VOCAB, second),
    "loss of each token, logits": (lambda h, y: (h.logsumexp(-1), y), VOCAB, second),
    "loss, logits": (lambda h, y: (h.mean(), y), VOCAB, second),
    "softmax of other logits, logits": (lambda h, y: (h.softmax(-1), y), VOCAB, second),
    "last rows of hidden, logits": (lambda h, y: (h[:, -1], y[:, -1]), VOCAB, second),
    "last row of hidden kept, logits": (lambda h, y: (h[:, -1:], y[:, -1:]), VOCAB, second),
    "hidden, last row of logits": (lambda h, y: (h, y[:, -1:]), VOCAB, second),
    "last row of hidden, logits of all": (lambda h, y: (h[:, -1:], y), VOCAB, second),
    "nested": (lambda h, y: ((h, h), y), VOCAB, second),
    "nested twice": (lambda h, y: ((h,), (y,)), VOCAB, lambda output: output[1][0]),
    "dict, hidden first": (lambda h, y: {"hidden": h, "logits": y}, VOCAB, lambda output: output["logits"]),
    "dict with output": (lambda h, y: {"hidden": h, "output": y}, VOCAB, lambda output: output["output"]),
    "dict with nested logits": (lambda h, y: {"a": h, "b": {"logits": y}}, VOCAB, lambda output: output["b"]["logits"]),
    "dict with lm_logits": (lambda h, y: {"logits_of_words": h, "lm_logits": y}, VOCAB, lambda o: o["lm_logits"]),
    "dataclass": (Output, VOCAB, lambda output: output.logits),
    "dataclass with scores": (ScoresOutput, VOCAB, lambda output: output.scores),
    "namedtuple": (Pair, VOCAB, lambda output: output.logits),
    "namespace": (lambda h, y: SimpleNamespace(hidden=h, logits=y), VOCAB, lambda output: output.logits),
    "ordered dict with attributes": (lambda h, y: Registered(hidden=h, logits=y), VOCAB, lambda o: o["logits"]),
    "stacked": (lambda h, y: torch.stack([h, y]), VOCAB, second),
    "stacked behind the tokens": (lambda h, y: torch.stack([h, y], 2), VOCAB, lambda output: output[:, :, 1]),
    "heads for the next tokens": (lambda h, y: (y + h, y), VOCAB, second),
    "hidden of half width, logits": (lambda h, y: (h, y), VOCAB // 2, second),
    "vocabulary first": (lambda h, y: y.transpose(1, 2), VOCAB, lambda output: output.transpose(1, 2)),
    "first row alone": (lambda h, y: (y[:, :1] + h[:, -1:] * 0, y), VOCAB, second),
    "one row before the last": (lambda h, y: (y[:, :-1], y), VOCAB, second),
    "shifted for a loss": (lambda h, y: (torch.cat([y[:, 1:], y[:, :1]], 1), y), VOCAB, second),
    "set of hidden states, logits": (lambda h, y: (h[:, None].repeat(1, 2, 1, 1), y), VOCAB, second),
}


def misread(output: Any) -> Tensor:
    """The first tensor that can be found."""
    if isinstance(output, Tensor):
        return output
    if isinstance(output, dict):
        output = list(output.values())
    elif not isinstance(output, tuple | list):
        output = list(vars(output).values())
    return misread(next(part for part in output if part is not None and not isinstance(part, int)))


ATTACKS: tuple[Attack, ...] = tuple(
    Attack(name, KLASS, returning(form, width), LENGTHS, logits=take, misread=misread)
    for name, (form, width, take) in FORMS.items()
)
# As documented: the first of a tuple, where nothing else could be meant.
LEGITIMATE: dict[str, tuple[Callable[[Tensor, Tensor], Any], int, Callable[[Any], Tensor]]] = {
    "logits, hidden": (lambda h, y: (y, h), DIM, misread),
    "logits, hidden as wide": (lambda h, y: (y, h), VOCAB, misread),
    "logits, None": (lambda h, y: (y, None), DIM, misread),
    "None, logits": (lambda h, y: (None, y), DIM, second),
    "number, logits": (lambda h, y: (3, y), DIM, second),
    "logits in a list": (lambda h, y: [y], DIM, misread),
    "logits, loss": (lambda h, y: (y, h.mean()), DIM, misread),
    "dict of logits": (lambda h, y: {"logits": y}, DIM, misread),
    "dict, hidden narrower": (lambda h, y: {"hidden": h, "logits": y}, DIM, lambda output: output["logits"]),
    "time first": (lambda h, y: y.transpose(0, 1), DIM, lambda output: output.transpose(0, 1)),
    "wider than the vocabulary": (lambda h, y: torch.cat([h, y], -1), VOCAB, lambda output: output),
    "last rows, every batch": (lambda h, y: y[:, -1], DIM, misread),
    "merged rows": (lambda h, y: y.flatten(0, 1), DIM, misread),
}
CONTROLS: tuple[Attack, ...] = tuple(
    Attack(f"returns {name}", "control", returning(form, width), LENGTHS, logits=take)
    for name, (form, width, take) in LEGITIMATE.items()
)
