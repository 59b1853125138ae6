"""What happens between the scores of an attention and its weights: softcap, bias, hidden keys, softmax, sinks."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from kvpass.errors import InputError
from kvpass.kernels.step_layout import Sight

GATHER_BYTES = {"cpu": 2 << 20}  # keys, and again values, held at once: they should stay in the processor's cache
SCORE_BYTES = {"cpu": 8 << 20}
DEVICE_BYTES = 64 << 20  # for both, on devices where a launch costs more than a miss


@dataclass(frozen=True, eq=False)
class PagedBias:
    """What is added to the scores of a paged attention, by position.

    Attributes:
        slopes: ``[Hkv, G]`` or None.
        table: ``[Hkv | 1, G | 1, L]`` by distance or ``[Hkv | 1, G | 1, L * L]`` by (query, key), or None.
        length: L.
        by_pair: the table is indexed by (query, key).
    """

    slopes: Tensor | None
    table: Tensor | None
    length: int
    by_pair: bool

    def look_up(self, heads: Tensor | slice, sight: Sight) -> Tensor | None:
        """The bias of some KV heads, broadcastable to ``[R, G, m, K]``; None if there is none."""
        bias = None
        distance = sight.query - sight.key
        if self.slopes is not None:
            bias = self.slopes[heads][:, :, None, None] * -distance
        if self.table is not None:
            place = sight.query * self.length + sight.key if self.by_pair else distance
            table = self.table[heads] if len(self.table) > 1 else self.table
            shape = torch.broadcast_shapes(table.shape[:2], (len(place), 1))
            place = place.clamp(0, table.shape[2] - 1).expand(*shape, *place.shape[2:])
            found = table.expand(*shape, -1).gather(2, place.flatten(2)).view(place.shape)
            bias = found if bias is None else bias + found
        return bias


def prepare_bias(
    slopes: Tensor | None,
    table: Tensor | None,
    groups: tuple[int, int],
    longest: int,
    reach: int | None,
    dtype: torch.dtype,
) -> PagedBias | None:
    """Slopes ``[Hq]`` and a bias table by KV head; None if there are none.

    Args:
        slopes: or None.
        table: ``[1 | Hq, L]`` or ``[1 | Hq, L, L]``, or None.
        groups: Hkv and G.
        longest: length of the longest sequence of the step.
        reach: most keys that a query sees, by window and chunk; None for all.
        dtype: of the scores.

    Raises:
        InputError: if the table is too short.
    """
    if slopes is None and table is None:
        return None
    if slopes is not None:
        slopes = slopes.to(dtype).view(groups)
    if table is None:
        return PagedBias(slopes, None, 0, False)
    length, by_pair = table.shape[-1], table.dim() == 3
    needed = longest if by_pair or reach is None else min(longest, reach)
    if needed > length:
        raise InputError(f"the bias covers {length} tokens, but the step needs {needed}: shorten the sequences")
    heads = (1, 1) if table.shape[0] == 1 else groups
    return PagedBias(slopes, table.to(dtype).reshape(*heads, -1), length, by_pair)


def weigh(
    scores: Tensor,
    softcap: float | None,
    bias: Tensor | None,
    sight: Sight | None,
    sinks: Tensor | None,
    log_sum: list[Tensor] | None = None,
) -> Tensor:
    """Softmax of scores ``[R, G, m, K]``, overwriting them; a row that sees nothing weighs nothing.

    Args:
        scores: ``scale * q.k``.
        softcap: bound of the scores.
        bias: broadcastable to the scores.
        sight: which of the keys are hidden.
        sinks: broadcastable to ``[R, G, 1, 1]``.
        log_sum: gets the log-sum-exp ``[R, G, m]`` appended, ``-inf`` for rows that see nothing.
    """
    if softcap is not None:
        scores.div_(softcap).tanh_().mul_(softcap)
    if bias is not None:
        scores.add_(bias)
    if sight is not None and sight.hidden is not None:
        scores[..., sight.hidden_from :].masked_fill_(sight.hidden, -torch.inf)
    weights = torch.softmax(scores, -1)
    if sinks is not None or log_sum is not None:
        total = torch.logsumexp(scores, -1, keepdim=True)
        if sinks is not None:
            # exp(s) / (exp(sink) + sum exp(s)) is softmax(s) * sigmoid(log sum exp(s) - sink)
            weights.mul_(torch.sigmoid(total - sinks))
        if log_sum is not None:
            with_sink = total if sinks is None else torch.logaddexp(total, sinks).masked_fill(
                total == -torch.inf, -torch.inf
            )  # fmt: skip
            log_sum.append(with_sink.squeeze(-1))
    may_see_nothing = bias is not None or (sight is not None and sight.may_see_nothing)
    if may_see_nothing and weights[..., 0].isnan().any():
        weights.masked_fill_(scores.amax(-1, keepdim=True) == -torch.inf, 0.0)
    return weights


def compute_dtype(query: Tensor) -> torch.dtype:
    """The dtype of scores, softmax and sums."""
    return torch.float64 if query.dtype == torch.float64 else torch.float32


def budget(table: dict[str, int], tensor: Tensor) -> int:
    """Bytes that may be held at once on the tensor's device."""
    return table.get(tensor.device.type, DEVICE_BYTES)
