"""Whether the tensors of a model are still those that it was compiled with: cheap enough to be asked at every step."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from kvpass.errors import WeightsChangedError
from kvpass.fx_passes.value_ledger import ValueLedger, digests

WHOLE = 1 << 20  # bytes of a tensor whose content is looked at as a whole at each prefill; of larger ones a sample
SAMPLE = 1 << 14  # elements of a sample
HOLDERS = ("_parameters", "_buffers", "_modules")
AGAIN = "compile the model again"


@dataclass(eq=False)
class _Watched:
    """A tensor whose value decided something, where it stands in the user's model, and what is known of it."""

    name: str
    decided: str
    tensor: Tensor
    holder: Any
    key: Any
    digest: int
    version: int | None
    pointer: int
    sample: int = 0

    def is_untouched(self) -> bool:
        """Whether nobody but through ``.data`` can have changed it."""
        try:
            tensor = self.holder[self.key]
        except LookupError:
            return False
        if tensor is not self.tensor or tensor.data_ptr() != self.pointer:
            return False
        return self.version is None or tensor._version == self.version


class LedgerCheck:
    """Compares a model with what it was when it was compiled.

    Attributes:
        tensors: every parameter and buffer of the model by its path, each once.
    """

    def __init__(
        self,
        model: nn.Module,
        ledger: ValueLedger,
        path_prefix: str = "",
        copied: Sequence[tuple[Tensor, Tensor]] = (),
    ) -> None:
        """Take note of the tensors of ``model`` as they are.

        Args:
            model: the user's module.
            ledger: what decided something, and all that was captured.
            path_prefix: path of the user's module in the names of the ledger.
            copied: tensors that the capture saw, and those of the model that they are copies of.

        Raises:
            WeightsChangedError: if a tensor is not what it was when it was captured or read.
        """
        self._prefix = f"{path_prefix}." if path_prefix else ""
        self._places = list(_places(model))
        named = [*model.named_parameters(), *model.named_buffers()]
        self.tensors: dict[str, Tensor] = dict(named)
        self._pointers = [_pointer(tensor) for tensor in self.tensors.values()]
        self._kinds = [_kind(tensor) for tensor in self.tensors.values()]
        self._joined = {id(tensor) for tensor in ledger.joined.values()}
        self._watched = [
            *self._entries(model, ledger, copied),
            *self._plain(model, ledger, copied),
            *self._constants(ledger, copied),
        ]
        self._paths = _paths(model, [watched.name for watched in self._watched])
        self._check_digests(whole=True)
        for watched, sample in zip(self._watched, digests([_part(w.tensor) for w in self._watched]), strict=True):
            watched.sample = sample

    @property
    def watched(self) -> dict[str, str]:
        """What the values of parameters and buffers decided, by their paths in the user's model."""
        return {watched.name: watched.decided for watched in self._watched}

    def check_step(self, tokens: int, sequences: int) -> None:
        """Look before a step: at objects, versions and memory always, at content where a prompt is computed.

        Args:
            tokens: of the step.
            sequences: of the step; more tokens than these mean that it computes prompts.

        Raises:
            WeightsChangedError: if a tensor whose value decided something was changed, or anything was replaced.
        """
        for holder, key, found in self._paths:
            if holder.get(key) is not found:
                self._check_places()
        for watched in self._watched:
            if not watched.is_untouched():
                self._look_at(watched)
        if tokens > sequences:
            self.check()

    def check(self, content: bool = True, whole: bool = False) -> None:
        """Look at everything; without ``content`` at objects and versions alone, ``whole`` at all of large tensors.

        Raises:
            WeightsChangedError: as :meth:`check_step`.
        """
        self._check_places()
        self._check_memory()
        for watched in self._watched:
            if not watched.is_untouched():
                self._look_at(watched)
        if content:
            self._check_digests(whole)

    def _entries(
        self, model: nn.Module, ledger: ValueLedger, copied: Sequence[tuple[Tensor, Tensor]]
    ) -> Iterator[_Watched]:
        originals = {id(copy): original for copy, original in copied}
        for name, captured in ledger.tensors.items():
            path = self._path(name)
            found = _find(model, path)
            if found is None or id(captured) in originals:
                continue
            holder, key = found
            if holder[key] is not captured and name not in ledger.entries:
                yield _watch(path, "a copy of it that is used", holder[key], holder, key, digests([captured])[0])
        for name, entry in ledger.entries.items():
            if id(entry.tensor) in originals:
                continue
            path = self._path(name)
            holder, key = _find(model, path) or ({"": entry.tensor}, "")
            yield _watch(path, entry.decided, holder[key], holder, key, entry.digest)

    def _plain(
        self, model: nn.Module, ledger: ValueLedger, copied: Sequence[tuple[Tensor, Tensor]]
    ) -> Iterator[_Watched]:
        """Tensors that are neither parameters nor buffers: the graph has a copy, or a number that was read of one."""
        used = {id(tensor) for tensor in ledger.tensors.values()}
        decided = {id(entry.tensor): entry.decided for entry in ledger.entries.values()}
        held = {id(tensor): (name, holder, key) for name, holder, key, tensor in _plain_tensors(model)}
        for copy, original in copied:
            if id(copy) in used or original.numel() == 1:
                default = ("a tensor that is neither parameter nor buffer", {"": original}, "")
                name, holder, key = held.get(id(original), default)
                what = decided.get(id(copy), "a constant of the graph")
                yield _watch(name, what, original, holder, key, digests([copy])[0])

    def _constants(self, ledger: ValueLedger, copied: Sequence[tuple[Tensor, Tensor]]) -> Iterator[_Watched]:
        """Tensors of the graph that are neither parameters nor buffers, nor copies: of a class or a variable."""
        known = {id(tensor) for tensor in self.tensors.values()} | {id(copy) for copy, _ in copied}
        for name, tensor in ledger.tensors.items():
            if id(tensor) not in known and name not in ledger.entries:
                yield _watch(
                    self._path(name), "a constant of the graph", tensor, {"": tensor}, "", digests([tensor])[0]
                )

    def _path(self, name: str) -> str:
        return name.removeprefix(self._prefix)

    def _check_places(self) -> None:
        for path, module, holder, ids, known in self._places:
            current = module.__dict__[holder]
            if list(map(id, current.values())) != ids:
                for key, value in known.items():
                    if current.get(key) is not value:
                        raise WeightsChangedError(
                            f"{_joined(path, key)} was replaced by another object after the model was compiled, and "
                            f"the engine has the old one: {AGAIN}, or change it in place"
                        )

    def _check_memory(self) -> None:
        pointers = [_pointer(tensor) for tensor in self.tensors.values()]
        if pointers == self._pointers:
            return
        for place, (name, tensor) in enumerate(self.tensors.items()):
            if pointers[place] == self._pointers[place]:
                continue
            if id(tensor) in self._joined:
                raise WeightsChangedError(
                    f"{name} was given other memory after the model was compiled, and is read as a part of a joined "
                    f"weight: {AGAIN}, or change it in place"
                )
            if _kind(tensor) != self._kinds[place]:
                raise WeightsChangedError(
                    f"{name} has another dtype, shape or device than when the model was compiled: {AGAIN}"
                )
        self._pointers = pointers

    def _look_at(self, watched: _Watched) -> None:
        """Raise unless a tensor that was touched has the same content still."""
        try:
            same = watched.holder[watched.key] is watched.tensor
        except LookupError:
            same = False
        if not same:
            raise WeightsChangedError(
                f"{watched.name} was replaced after the model was compiled, and its value decided "
                f"{watched.decided}: {AGAIN}"
            )
        self._compare([watched], whole=True)
        watched.pointer, watched.version = _pointer(watched.tensor), _version(watched.tensor)

    def _check_digests(self, whole: bool) -> None:
        self._compare(self._watched, whole)

    def _compare(self, chosen: Sequence[_Watched], whole: bool) -> None:
        parts = [w.tensor if whole else _part(w.tensor) for w in chosen]
        for watched, found in zip(chosen, digests(parts), strict=True):
            if found != (watched.digest if whole else watched.sample):
                raise WeightsChangedError(
                    f"{watched.name} was changed after the model was compiled, and its value decided "
                    f"{watched.decided}: {AGAIN}, or put the value back"
                )


def _watch(name: str, decided: str, tensor: Tensor, holder: Any, key: Any, digest: int) -> _Watched:
    return _Watched(name, decided, tensor, holder, key, digest, _version(tensor), _pointer(tensor))


def _places(model: nn.Module) -> Iterator[tuple[str, nn.Module, str, list[int], dict[str, object]]]:
    """For each module and kind of attribute: path, module, kind, and what it holds now."""
    for path, module in model.named_modules():
        for holder in HOLDERS:
            known = dict(module.__dict__.get(holder, {}))
            if known:
                yield path, module, holder, list(map(id, known.values())), known


def _find(model: nn.Module, path: str) -> tuple[Any, str] | None:
    """The dict that holds the tensor at a path, and its key there."""
    owner, _, leaf = path.rpartition(".")
    try:
        module = model.get_submodule(owner)
    except AttributeError:
        return None
    for holder in (module._parameters, module._buffers, module.__dict__):
        if isinstance(holder.get(leaf), Tensor):
            return holder, leaf
    return None


def _paths(model: nn.Module, names: Sequence[str]) -> list[tuple[Mapping[str, object], str, object]]:
    """The links that lead from the model to the owners of tensors, each once."""
    links: dict[str, tuple[Mapping[str, object], str, object]] = {}
    for name in names:
        module, steps = model, name.split(".")[:-1]
        for depth, step in enumerate(steps):
            child = module._modules.get(step)
            if child is None:
                break
            links[".".join(steps[: depth + 1])] = (module._modules, step, child)
            module = child
    return list(links.values())


def _plain_tensors(model: nn.Module) -> Iterator[tuple[str, Any, Any, Tensor]]:
    """Tensors among the attributes of modules, and in lists, tuples and dicts there: name, holder, key and tensor."""
    for path, module in model.named_modules():
        for name, value in module.__dict__.items():
            if isinstance(value, Tensor):
                yield _joined(path, name), module.__dict__, name, value
            elif isinstance(value, (list, tuple, dict)) and name not in HOLDERS:
                for key, item in value.items() if isinstance(value, dict) else enumerate(value):
                    if isinstance(item, Tensor):
                        yield f"{_joined(path, name)}[{key!r}]", value, key, item


def _joined(path: str, name: str) -> str:
    return f"{path}.{name}" if path else name


def _version(tensor: Tensor) -> int | None:
    """How often it was changed in place; None where nobody counts."""
    return None if tensor.is_inference() else tensor._version


def _pointer(tensor: Tensor) -> int:
    try:
        return tensor.data_ptr()
    except RuntimeError:  # a tensor of a special kind has no memory of its own
        return 0


def _kind(tensor: Tensor) -> tuple[torch.dtype, torch.device, torch.Size]:
    return tensor.dtype, tensor.device, tensor.shape


def _part(tensor: Tensor) -> Tensor:
    """The tensor, or evenly spaced elements of a large one."""
    if tensor.nbytes <= WHOLE:
        return tensor
    return sample_of(tensor, SAMPLE)


def sample_of(tensor: Tensor, most: int) -> Tensor:
    """At most so many elements ``[n]``, evenly spaced and in different columns; a view where the tensor is dense."""
    flat = tensor.detach().reshape(-1)
    step = -(-flat.numel() // most)
    width = tensor.shape[-1] if tensor.dim() else 1
    if step > 1 and (width % step == 0 or step % max(1, width) == 0):  # else all would stand in a few columns
        step += 1
    return flat[::step]
