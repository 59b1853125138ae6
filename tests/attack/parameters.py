"""Random changes of a decoder's tensors while an engine serves it: the engine follows each, or raises a KvpassError.

One engine per family goes through its changes one after the other; each is undone, after which it must be right or
raise again. What it says is its probabilities of the tokens that it chose, held against the changed model without a
cache; where the cache is quantised, against an engine that is compiled from a copy of the changed model.

A change of one entry of a large tensor through memory that has no version may be missed by design: after such a one
`engine.weights_changed()` is said, and the verdict counted apart.
"""

from __future__ import annotations

import copy
import random
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

import kvpass
from kvpass.errors import KvpassError
from tests.attack.changed_models import FAMILIES
from tests.attack.verdict import Verdict
from tests.changing import PROMPT, VOCAB, Case, differs

CHANGES = 30
SAMPLED = 4096  # entries up to which the engine looks at all of a tensor
EXACT, QUANTISED = 2e-3, 2e-2
LOOSE, STRICT_EVERY = 1.0, 10  # a quantised cache may be so far off where no fresh engine is compiled
TOKENS = 3
WAYS = (
    "copy_", "data.mul_", "data.copy_", "one entry", "one entry of data", "add_", "load_state_dict", "setattr",
    "module", "data = other", "numpy", "numpy, one entry", "optimizer", "fill_ of a row", "swap of rows",
    "neg_ of data", "assign",
)  # fmt: skip
SILENT = {"one entry of data", "numpy, one entry"}
NAMES = tuple(FAMILIES)


def family_of(number: int) -> str:
    """The family of an example; thirty in a row have the same."""
    return NAMES[number // 3 // CHANGES % len(NAMES)]


def judge(first: int, count: int = CHANGES) -> Iterator[Verdict]:
    """The verdicts on the examples of a group, from its first number on, all on one engine."""
    name = family_of(first)
    case = FAMILIES[name]
    model = case.build()
    try:
        engine = case.compile(model)
    except KvpassError as error:
        for number in range(first, first + 3 * count, 3):
            yield Verdict(number, "refused", False, f"not compiled: {error}"[:150], name)
        return
    before = _Judge(case, model).says(engine, PROMPT, False)
    for number in range(first, first + 3 * count, 3):
        draw = random.Random(number)
        path, tensor = draw.choice(_tensors(model))
        way = draw.choice(WAYS)
        said = way in SILENT and tensor.numel() > SAMPLED
        undo = _change(model, path, tensor, way, draw)
        unseen = [draw.randrange(VOCAB) for _ in range(17)]
        now = _Judge(case, model, strict=number // 3 % STRICT_EVERY == 0)
        found = [now.says(engine, prompt, said) for prompt in (PROMPT, unseen)]
        undo()
        found.append(_Judge(case, model).says(engine, PROMPT, said))
        stages = zip(("before", "seen", "unseen", "undone"), (before, *found), strict=True)
        if found[-1][0] == "refused":  # it may raise until it is compiled again
            model = case.build()
            engine = case.compile(model)
        wrong = [f"{stage}: {what}" for stage, (outcome, what) in stages if outcome == "wrong"]
        refused = [what for outcome, what in found if outcome == "refused"]
        outcome = "wrong" if wrong else "refused" if refused else "right"
        yield Verdict(number, outcome, False, "; ".join(wrong or refused[:1]), f"{name}: {way} of {path}", said)


class _Judge:
    """What a model as it is now says, against an engine; a fresh engine is compiled of a copy where it is needed."""

    def __init__(self, case: Case, model: nn.Module, strict: bool = False) -> None:
        self.case, self.model, self.strict = case, model, strict
        self.fresh: kvpass.Engine | None = None

    def says(self, engine: kvpass.Engine, prompt: list[int], said: bool) -> tuple[str, str]:
        """An outcome, and its detail."""
        try:
            if said:
                engine.weights_changed()
            off = differs(engine, self.model, prompt, TOKENS)
            if off < EXACT:
                return "right", ""
            if "dtype" not in self.case.config:
                return "wrong", f"log-probabilities are {off:.1e} off"
            if off < LOOSE and not self.strict:
                return "right", ""
            self.fresh = self.fresh or self.case.compile(copy.deepcopy(self.model))
            off = float((_first(engine, prompt) - _first(self.fresh, prompt)).abs().max())
        except KvpassError as error:
            return "refused", f"{type(error).__name__}: {error}"[:150]
        return ("right", "") if off < QUANTISED else ("wrong", f"{off:.1e} off what a fresh engine says")


def _first(engine: kvpass.Engine, prompt: list[int]) -> Tensor:
    """Log-probabilities `[V]` of the first new token."""
    handle = engine.submit(prompt, 1, kvpass.Sampling(logprobs=VOCAB, ignore_eos=True))
    handle.result()
    top = dict(handle.logprobs[0].top)
    return torch.tensor([top[i] for i in range(VOCAB)])


def _tensors(model: nn.Module) -> list[tuple[str, Tensor]]:
    return [*model.named_parameters(), *model.named_buffers()]


def _owner(model: nn.Module, path: str) -> tuple[nn.Module, str]:
    owner, _, name = path.rpartition(".")
    return model.get_submodule(owner), name


def _other(tensor: Tensor, draw: random.Random) -> Tensor:
    """Another content of the same kind."""
    generator = torch.Generator().manual_seed(draw.randrange(10**6))
    if tensor.dtype == torch.bool:
        return tensor ^ (torch.rand(tensor.shape, generator=generator) < 0.2).tril(-1)
    if not tensor.is_floating_point():
        return tensor + 1 if tensor.numel() == 1 and int(tensor) >= 0 else tensor.flip(0)
    return tensor * draw.choice((0.5, -1.0, 1.4)) + 0.2 * torch.randn(tensor.shape, generator=generator)


@torch.no_grad()
def _change(model: nn.Module, path: str, tensor: Tensor, way: str, draw: random.Random) -> Callable[[], None]:
    """Change a tensor, or what holds it; returns what undoes it."""
    before = [(t, t.data, t.detach().clone()) for _, t in _tensors(model)]
    owner, name = _owner(model, path)
    other = _other(tensor.detach(), draw)
    place = tuple(draw.randrange(size) for size in tensor.shape)
    entry = other[place]
    if bool(entry == tensor[place]):
        entry = ~entry if entry.dtype == torch.bool else entry + 1
    holder: list[tuple[nn.Module, str, Any]] = []
    if way == "swap of rows" and tensor.is_floating_point() and tensor.dim():
        tensor.copy_(tensor.flip(0))
    elif way in ("copy_", "swap of rows") or (tensor.dtype == torch.bool and way in ("data.mul_", "add_")):
        tensor.copy_(other)
    elif way == "data.mul_":
        tensor.data.mul_(2)
    elif way == "neg_ of data":
        tensor.data.neg_() if tensor.is_floating_point() else tensor.data.copy_(other)
    elif way == "data.copy_":
        tensor.data.copy_(other)
    elif way == "one entry":
        tensor[place] = entry
    elif way == "one entry of data":
        tensor.data[place] = entry
    elif way == "add_":
        tensor.add_(other - tensor)
    elif way == "load_state_dict":
        model.load_state_dict({**model.state_dict(), path: other})
    elif way == "assign":
        held = [(*_owner(model, path), t) for path, t in _tensors(model)]
        holder += [one for one in held if one[0] is owner or owner is model]
        owner.load_state_dict({**owner.state_dict(), name: other}, assign=True)
    elif way == "setattr":
        holder.append((owner, name, tensor))
        setattr(owner, name, nn.Parameter(other) if isinstance(tensor, nn.Parameter) else other)
    elif way == "module" and owner is not model:
        parent, child = _owner(model, path.rpartition(".")[0])
        holder.append((parent, child, owner))
        fresh = copy.deepcopy(owner)
        getattr(fresh, name).copy_(other)
        setattr(parent, child, fresh)
    elif way in ("data = other", "module"):
        tensor.data = other.clone()
    elif way == "numpy":
        tensor.detach().numpy()[...] = other.numpy()
    elif way == "numpy, one entry":
        tensor.detach().numpy()[place] = entry.item()
    elif way == "fill_ of a row":
        (tensor[0] if tensor.dim() else tensor).fill_(entry.item())
    elif way == "optimizer":
        _step(model)
    # One entry that is put back through memory without a version could be missed by design, as its change could.
    quiet = draw.random() < 0.5 and way not in {"one entry", *SILENT}

    @torch.no_grad()
    def undo() -> None:
        for module, attribute, kept in holder:
            setattr(module, attribute, kept)
        for held, memory, content in before:
            if held.data_ptr() != memory.data_ptr():
                held.data = memory
            if not torch.equal(held, content):
                (held.data if quiet else held).copy_(content)

    return undo


def _step(model: nn.Module) -> None:
    optimizer = torch.optim.SGD(model.parameters(), lr=0.3)
    ids = torch.tensor([PROMPT])
    with torch.enable_grad():
        logits = model(ids)
        torch.nn.functional.cross_entropy(logits[0, -1:], ids[0, -1:]).backward()
    optimizer.step()
    optimizer.zero_grad()
