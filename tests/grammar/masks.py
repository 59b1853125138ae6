"""What a query may see, as booleans or biases `[1 or H, S, S]`, and how that is put onto scores."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from tests.grammar.shape import MAX_LENGTH, WINDOW, Part


def _positions(length: int, device: torch.device) -> tuple[Tensor, Tensor]:
    i = torch.arange(length, device=device)
    return i[:, None], i[None, :]


def tril_of_ones(m: Part, n: int, device: torch.device) -> Tensor:
    return torch.tril(torch.ones(n, n, device=device)) == 1


def not_triu(m: Part, n: int, device: torch.device) -> Tensor:
    return ~torch.ones(n, n, dtype=torch.bool, device=device).triu(diagonal=1)


def compared_positions(m: Part, n: int, device: torch.device) -> Tensor:
    q, k = _positions(n, device)
    return k <= q


def counted_by_cumsum(m: Part, n: int, device: torch.device) -> Tensor:
    count = torch.ones(n, dtype=torch.long, device=device).cumsum(0)
    return count.unsqueeze(1).ge(count.unsqueeze(0))


def sliced_buffer(m: Part, n: int, device: torch.device) -> Tensor:
    return m.constant("tril", torch.ones(MAX_LENGTH, MAX_LENGTH, dtype=torch.bool).tril())[:n, :n]


def cumulative_eye(m: Part, n: int, device: torch.device) -> Tensor:
    """Ones below the diagonal as a running sum of the identity."""
    return torch.eye(n, device=device).cumsum(0) > 0


def window_of_two_bands(m: Part, n: int, device: torch.device) -> Tensor:
    ones = torch.ones(n, n, dtype=torch.bool, device=device)
    return ones.tril() & ones.triu(1 - WINDOW)


def window_by_distance(m: Part, n: int, device: torch.device) -> Tensor:
    q, k = _positions(n, device)
    return (q - k >= 0) & (q - k < WINDOW)


def chunks(m: Part, n: int, device: torch.device) -> Tensor:
    q, k = _positions(n, device)
    return torch.logical_and(q // WINDOW == k // WINDOW, k <= q)


def window_and_first(m: Part, n: int, device: torch.device) -> Tensor:
    """A window, and the first two tokens for all (attention sinks)."""
    q, k = _positions(n, device)
    return (k <= q) & ((q - k < WINDOW) | (k < 2))


def window_per_head(m: Part, n: int, device: torch.device) -> Tensor:
    q, k = _positions(n, device)
    sizes = m.constant("sizes", torch.tensor([3, 5, 8, MAX_LENGTH])[: m.h])
    return (k <= q) & (q - k < sizes[:, None, None])


VISIBLE: dict[str, Callable[[Part, int, torch.device], Tensor]] = {
    "tril of ones": tril_of_ones,
    "not triu": not_triu,
    "compared positions": compared_positions,
    "counted by cumsum": counted_by_cumsum,
    "sliced buffer": sliced_buffer,
    "cumulative eye": cumulative_eye,
    "window of two bands": window_of_two_bands,
    "window by distance": window_by_distance,
    "chunks": chunks,
    "window and first": window_and_first,
    "window per head": window_per_head,
}


def alibi(m: Part, n: int, device: torch.device) -> Tensor:
    q, k = _positions(n, device)
    slopes = torch.tensor([2.0 ** -(i + 1) for i in range(m.h)], device=device)
    return slopes[:, None, None] * (k - q)


def alibi_of_keys(m: Part, n: int, device: torch.device) -> Tensor:
    """ALiBi by the key's place alone: a softmax does not see the rest (BLOOM)."""
    slopes = m.constant("slopes", torch.tensor([0.5, 0.25, 0.125, 0.0625])[: m.h])
    return slopes[:, None, None] * torch.arange(n, device=device)[None, None, :]


def relative_table(m: Part, n: int, device: torch.device) -> Tensor:
    """A learned number per head and distance, distances past 7 in one (T5)."""
    q, k = _positions(n, device)
    return m.weight("relative", 8, m.h, spread=0.8)[(q - k).clamp(0, 7)].permute(2, 0, 1)


def log_distance(m: Part, n: int, device: torch.device) -> Tensor:
    q, k = _positions(n, device)
    return -m.weight("decay", m.h, 1, 1, around=0.5, spread=0.2) * torch.log1p((q - k).abs().float())


BIASES: dict[str, Callable[[Part, int, torch.device], Tensor] | None] = {
    "none": None,
    "ALiBi": alibi,
    "ALiBi of keys": alibi_of_keys,
    "relative table": relative_table,
    "log distance": log_distance,
}


def fill_minus_infinity(scores: Tensor, seen: Tensor) -> Tensor:
    return scores.masked_fill(~seen, float("-inf"))


def fill_zero_is_hidden(scores: Tensor, seen: Tensor) -> Tensor:
    return scores.masked_fill(seen.float() == 0, -1e9)


def fill_in_place(scores: Tensor, seen: Tensor) -> Tensor:
    return scores.masked_fill_(seen.logical_not(), torch.finfo(scores.dtype).min)


def where_number(scores: Tensor, seen: Tensor) -> Tensor:
    return torch.where(seen, scores, -torch.inf)


def where_tensor(scores: Tensor, seen: Tensor) -> Tensor:
    return torch.where(seen, scores, torch.full([], torch.finfo(scores.dtype).min, device=scores.device))


def where_full(scores: Tensor, seen: Tensor) -> Tensor:
    return torch.where(seen.expand_as(scores), scores, torch.full_like(scores, -torch.inf))


def where_hidden_first(scores: Tensor, seen: Tensor) -> Tensor:
    return torch.where(~seen, torch.tensor(-1e30, device=scores.device), scores)


def add_zeros_filled(scores: Tensor, seen: Tensor) -> Tensor:
    return scores + torch.zeros(seen.shape, device=scores.device).masked_fill(~seen, -torch.inf)


def add_one_minus_times(scores: Tensor, seen: Tensor) -> Tensor:
    return scores + (1.0 - seen.to(scores.dtype)) * torch.finfo(scores.dtype).min


def subtract_times(scores: Tensor, seen: Tensor) -> Tensor:
    return scores - 1e9 * (~seen).float()


def add_log(scores: Tensor, seen: Tensor) -> Tensor:
    return scores + seen.float().log()


def multiplied_and_shifted(scores: Tensor, seen: Tensor) -> Tensor:
    """The first GPT's: times the mask, less a large number times its complement."""
    keep = seen.to(scores.dtype)
    return scores * keep - 1e10 * (1 - keep)


def clamped_sum(scores: Tensor, seen: Tensor) -> Tensor:
    low = torch.finfo(scores.dtype).min
    return torch.max(scores + torch.where(seen, 0.0, low), torch.tensor(low, device=scores.device))


def float_column(scores: Tensor, seen: Tensor) -> Tensor:
    """A float mask made by `where`, added in place."""
    mask = torch.where(seen, torch.zeros((), device=scores.device), torch.tensor(-math.inf, device=scores.device))
    return scores.add_(mask)


def assigned(scores: Tensor, seen: Tensor) -> Tensor:
    scores = scores.clone()
    scores[~seen.expand_as(scores)] = -torch.inf
    return scores


HIDING: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "masked_fill(-inf)": fill_minus_infinity,
    "masked_fill(-1e9) where zero": fill_zero_is_hidden,
    "masked_fill_(finfo.min)": fill_in_place,
    "where, -inf": where_number,
    "where, tensor": where_tensor,
    "where, full_like": where_full,
    "where hidden first": where_hidden_first,
    "added zeros and -inf": add_zeros_filled,
    "added (1 - mask) * min": add_one_minus_times,
    "less 1e9 * hidden": subtract_times,
    "added log": add_log,
    "times mask, less 1e10": multiplied_and_shifted,
    "clamped sum": clamped_sum,
    "added in place": float_column,
    "assigned by index": assigned,
}
