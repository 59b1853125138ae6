"""``kvpass.cached``: a loop that gives the model whole sequences computes only what is new."""

from __future__ import annotations

from typing import Any, Literal, get_args

from torch import Tensor

from kvpass.dynamo.calls import LeftAlone, ModelCall
from kvpass.dynamo.graph_engines import GraphEngine
from kvpass.dynamo.rows import read_batch
from kvpass.dynamo.scopes import Scope
from kvpass.dynamo.under_way import Reading
from kvpass.errors import InputError, RefusedError
from kvpass.fx_passes.graph import LogitsRows

Rows = Literal["last", "all"]


class CachedScope(Scope):
    """See :func:`cached`."""

    def __init__(self, compiled: Any, rows: Rows) -> None:
        super().__init__(compiled)
        if rows not in get_args(Rows):
            raise InputError(f"rows={rows!r} is unknown: choose 'last' or 'all'")
        self._rows = rows

    def _compute(self, found: GraphEngine, call: ModelCall, reading: Reading) -> Tensor:
        batch = read_batch(call.ids, call.attention_mask, call.position_ids)
        session = self._session(found.engine)
        self._try_short(found, call, session, batch.rows[0])
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
        if batch.is_padded:
            found.check_padding(self._model, call, batch.sides)
        return found.as_given(logits)

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
