"""Rewritten graphs that outlive their process, among the artifacts of ``torch.compiler.save_cache_artifacts()``.

What is saved is the graph of one step, its plan and its report; the weights are the model's own and are not saved. It
is found again by everything that it was proven and verified for: the graph as Dynamo traced it, the call, the weights'
content, the sources of the model's classes, the configuration, and the versions of kvpass and torch.
"""

from __future__ import annotations

import inspect
import io
import logging
import pickle
from collections.abc import Mapping
from dataclasses import dataclass
from hashlib import blake2b
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.compiler._cache import CacheArtifact, CacheArtifactFactory, CacheArtifactManager

from kvpass.dynamo.calls import ModelCall
from kvpass.dynamo.graph_site import GraphSite
from kvpass.fx_passes.graph import LogitsRows
from kvpass.fx_passes.ledger_check import LedgerCheck
from kvpass.fx_passes.lowering.bind import PagedModule
from kvpass.fx_passes.optimization.merge_projections import are_adjacent, is_plain, join_rows, owns_its_memory
from kvpass.fx_passes.value_ledger import ValueLedger, digests
from kvpass.outputs import Path as OutputPath
from kvpass.report import RewriteReport

LOGGER = logging.getLogger("kvpass")
TYPE = "kvpass"
MOST_BYTES = 256 << 20  # of one artifact, which stays in memory: tables and rotated weights may be large

_LOADED: dict[str, bytes] = {}


@CacheArtifactFactory.register
class GraphArtifact(CacheArtifact):
    """A rewritten graph."""

    def populate_cache(self) -> None:
        """Have it found in this process."""
        _LOADED[self.key] = self.content

    @staticmethod
    def type() -> str:
        """Its name among torch's artifacts."""
        return TYPE


@dataclass(frozen=True)
class SavedGraph:
    """What a proof and a verification have come to.

    Attributes:
        module: the graph of one step; without a guard while it is pickled.
        report: of the rewrite.
        rows: which rows of logits the graph gives.
        output: which of its outputs they are.
        path: of the logits in what the model returns.
        ledger: the tensors whose values decided something, by their names in the capture.
        prefix: what precedes the model's own names there.
    """

    module: PagedModule
    report: RewriteReport
    rows: LogitsRows
    output: int
    path: OutputPath
    ledger: ValueLedger
    prefix: str


def key_of(model: nn.Module, call: ModelCall, site: GraphSite, held: Mapping[str, Tensor]) -> str:
    """What a graph is found by; reads every weight once.

    Args:
        model: the user's.
        call: how it was called.
        site: its graph.
        held: the tensors of the graph, by name.
    """
    digest = blake2b(digest_size=16)
    parts = [version("kvpass"), torch.__version__, site.text, site.options.cache_key, repr(call.form)]
    parts += [f"{name} {tensor.dtype} {tuple(tensor.shape)} {tensor.device}" for name, tensor in held.items()]
    parts += map(str, digests(list(held.values())))
    parts += sorted(map(_source_of, {type(module) for module in model.modules()}))
    for part in parts:
        digest.update(f"{len(part)}:{part}".encode())
    return digest.hexdigest()


def _source_of(kind: type) -> str:
    """The file that a class was written in, as a digest; where there is none, what its forward does."""
    try:
        content = Path(inspect.getfile(kind)).read_bytes()
    except (TypeError, OSError):
        code = getattr(getattr(kind, "forward", None), "__code__", None)
        content = b"" if code is None else code.co_code + repr((code.co_consts, code.co_names)).encode()
    return f"{kind.__qualname__} {blake2b(content, digest_size=16).hexdigest()}"


def save(key: str, saved: SavedGraph, held: Mapping[str, Tensor]) -> None:
    """Have torch's cache artifacts hold a graph; where that cannot be, the log says why."""
    guard, saved.module.guard = saved.module.guard, None
    try:
        content = io.BytesIO()
        _Pickler(content, held).dump(saved)
    except Exception as error:  # what cannot be pickled is proven anew in the next process
        LOGGER.info("the rewritten graph cannot be saved: %s: %s", type(error).__name__, error)
        return
    finally:
        saved.module.guard = guard
    if content.tell() > MOST_BYTES:
        LOGGER.info("the rewritten graph is not saved: it has %d bytes of tables or weights of its own", content.tell())
        return
    CacheArtifactManager.record_artifact(TYPE, key, content.getvalue())


def load(key: str, model: nn.Module, held: Mapping[str, Tensor]) -> SavedGraph | None:
    """A graph of ``torch.compiler.load_cache_artifacts``; None if there is none, or it does not fit."""
    content = _LOADED.get(key)
    if content is None:
        return None
    try:
        found: SavedGraph = _Unpickler(io.BytesIO(content), held).load()
        found.module.guard = LedgerCheck(model, found.ledger, found.prefix)
    except Exception as error:  # whatever is wrong with it, the model can be proven anew
        LOGGER.info("a saved graph does not fit: %s: %s", type(error).__name__, error)
        return None
    LOGGER.info("found a saved graph, proven and verified for this model: %s", key)
    return found


class _Pickler(pickle.Pickler):
    """Writes tensors of the model as their names."""

    def __init__(self, file: io.BytesIO, held: Mapping[str, Tensor]) -> None:
        super().__init__(file)
        self._names = {id(tensor): name for name, tensor in held.items()}
        self._held = held

    def persistent_id(self, thing: Any) -> Any:
        """The name of a tensor, or of those that it is made of."""
        if not isinstance(thing, Tensor):
            return None
        name = self._names.get(id(thing))
        if name is not None:
            return name
        parts = self._parts_of(thing)
        return parts or None

    def _parts_of(self, whole: Tensor) -> tuple[str, ...]:
        """The tensors of the model that lie one after the other in the memory of ``whole`` and fill it."""
        if not isinstance(whole, nn.Parameter):
            return ()
        memory, start = whole.untyped_storage().data_ptr(), whole.storage_offset()
        inside = [
            (tensor.storage_offset(), name)
            for name, tensor in self._held.items()
            if tensor.untyped_storage().data_ptr() == memory
            and start <= tensor.storage_offset() < start + whole.numel()
        ]
        names = tuple(name for _, name in sorted(inside))
        parts = [self._held[name] for name in names]
        fits = parts and sum(part.numel() for part in parts) == whole.numel() and are_adjacent(parts)
        return names if fits and all(part.shape[1:] == whole.shape[1:] for part in parts) else ()


class _Unpickler(pickle.Unpickler):
    """Reads names as tensors of the model."""

    def __init__(self, file: io.BytesIO, held: Mapping[str, Tensor]) -> None:
        super().__init__(file)
        self._held = held
        self._joined: dict[tuple[str, ...], nn.Parameter] = {}

    def persistent_load(self, pid: Any) -> Any:
        """The tensor of a name; those of several names are joined, as a rewrite joins them."""
        if isinstance(pid, str):
            return self._held[pid]
        if pid not in self._joined:
            parts = [self._held[name] for name in pid]
            if not all(map(is_plain, parts)) or not (are_adjacent(parts) or all(map(owns_its_memory, parts))):
                raise pickle.UnpicklingError(f"the weights {', '.join(pid)} are shared, and cannot be joined")
            self._joined[pid] = join_rows(parts)
        return self._joined[pid]
