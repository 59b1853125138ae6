"""``kvpass.cached``: a loop that gives the model whole sequences computes only what is new."""

from __future__ import annotations

from typing import Any, Literal, get_args

import torch
from torch import Tensor

from kvpass.dynamo.calls import LeftAlone, ModelCall
from kvpass.dynamo.graph_engines import GraphEngine
from kvpass.dynamo.graph_site import answered_by
from kvpass.dynamo.rows import Batch, as_graph_gives, read_batch
from kvpass.dynamo.scopes import Scope
from kvpass.errors import InputError, RefusedError
from kvpass.fx_passes.graph import LogitsRows
from kvpass.outputs import logits_at

Rows = Literal["last", "all"]


class CachedScope(Scope):
    """See :func:`cached`."""

    def __init__(self, compiled: Any, rows: Rows) -> None:
        super().__init__(compiled)
        if rows not in get_args(Rows):
            raise InputError(f"rows={rows!r} is unknown: choose 'last' or 'all'")
        self._rows = rows
        self._padding_is_known: set[GraphEngine] = set()

    def _compute(self, found: GraphEngine, call: ModelCall) -> Tensor:
        batch = read_batch(call.ids, call.attention_mask, call.position_ids)
        session = self._session(found.engine)
        everything = self._rows == "all" and found.rows is not LogitsRows.LAST
        if everything:
            logits = batch.place(session.logits_from(batch.rows, [0] * len(batch.rows)))
        else:
            if batch.is_padded_behind:
                raise InputError(
                    "a row ends in padding, and logits of its last place mean nothing: pad on the left, or ask for "
                    "kvpass.cached(model, rows='all')"
                )
            logits = session.logits(batch.rows)[:, None]
        if batch.is_padded and call.positions is None and found not in self._padding_is_known:
            self._check_padding(found, call, batch, logits)
            self._padding_is_known.add(found)
        return as_graph_gives(found, logits)

    def _check_padding(self, found: GraphEngine, call: ModelCall, batch: Batch, logits: Tensor) -> None:
        """Compare the first padded batch with the model itself, which may count padding as positions.

        Raises:
            LeftAlone: if it does.
        """
        args, kwargs = call.bound({})
        with answered_by(None), torch.no_grad():
            wanted = logits_at(self._model._call_impl(*args, **kwargs), found.path).reshape(
                len(batch.rows), -1, logits.shape[-1]
            )
        for row, (tokens, start) in enumerate(zip(batch.rows, batch.starts, strict=True)):
            end = start + len(tokens) - batch.length - 1
            if not found.agree(logits[row, end if logits.shape[1] > 1 else -1], wanted[row, end]):
                raise LeftAlone(
                    "it gives a padded row other logits than the same row alone, for it counts padding as positions: "
                    "pass position_ids, or rows of one length"
                )

    def _leave_alone(self, reason: LeftAlone | RefusedError) -> None:
        self._doorway.leave_alone(reason)


def cached(compiled: Any, rows: Rows = "last") -> CachedScope:
    """A scope in which a loop that gives the model whole sequences computes only what is new.

    ``with kvpass.cached(model) as cache: ...``: each row of the token ids is known by its content. A row that goes on
    from one of the call before costs one token; of any other row, what the cache has of its beginning is taken over.
    Batches may change, rows part and go back; rows may be padded, with an ``attention_mask`` of ones and zeros.
    Gradients are not computed. A call that no cache can be kept for is computed as outside of the scope, and a
    :class:`kvpass.KvpassWarning` says why, once.

    Args:
        compiled: what ``torch.compile(model, backend="kvpass")`` returns.
        rows: ``"last"``: logits ``[B, 1, V]`` of the last token of each row, so that ``logits[:, -1]`` is what it would
            be; ``"all"``: of every token, ``[B, S, V]``, zero at padding.

    Raises:
        InputError: if the model was not compiled with this backend; on entering, if it is in training mode or this
            thread is in a scope of it already; by a call, for token ids or masks that cannot be, or rows longer than
            the model or the pool allow.
        RefusedError: by a call, with ``options={"on_refusal": "error"}``, where no cache can be kept.
        CapacityError: by a call, if the pool is too small.
    """
    return CachedScope(compiled, rows)
