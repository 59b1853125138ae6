"""Why a request failed, in words for who asked."""

from __future__ import annotations

from kvpass.engine.request import Request
from kvpass.errors import KvpassError, WeightsChangedError
from kvpass.types import CachePlan


def why_failed(request: Request, plan: CachePlan) -> str:
    """Why no token could be chosen for a request."""
    where = f"prompts[{request.index}] after {request.delivered} new tokens"
    if request.sequence.failure is not None:
        return f"{where}: {request.sequence.failure}"
    last = request.sequence.output[-1:]
    if last and last[0] in plan.forbidden_tokens:
        return (
            f"the model gave token {last[0]}, the padding token, for {where}: what follows it is not proven; end "
            f"there with Sampling(stop_token_ids=({last[0]},))"
        )
    if last and last[0] >= plan.vocab_size:
        return (
            f"the model gave token {last[0]} for {where}, and can look up {plan.vocab_size} tokens: its "
            f"logits are wider than its vocabulary; rule the others out with Sampling(allowed_tokens=...)"
        )
    return (
        f"the model gave logits with NaN or infinity for {where}, so no token could be chosen: run the original "
        f"model on it; if that is finite, the cache dtype may overflow, and bfloat16 or float32 reach further than "
        f"float16"
    )


def step_failed(error: BaseException) -> KvpassError:
    """What the requests of a step are told that failed, where nobody waits who could see the error itself."""
    if isinstance(error, WeightsChangedError):
        failure: KvpassError = WeightsChangedError(str(error))
    else:
        failure = KvpassError(f"a step that this request took part in failed: {error!r}; its cause is chained")
    failure.__cause__ = error
    return failure
