"""The length without its name: counted by ops, printed as text, read from strides; and special at a single token."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from tests.adversarial.masks import cut_if
from tests.adversarial.parts import DIM, Attack, Build, causal, distances, length, masked, tiny

KLASS = "length counted"
AT, MULTIPLE = 100, (61, 122)


def _ones(s: Any) -> Tensor:
    return torch.ones(s)


# Name: the length as a number, without asking for it (at least where it matters).
COUNTED: dict[str, Callable[[Any], Tensor]] = {
    "norm": lambda s: _ones(s).norm() ** 2,
    "product of ones": lambda s: (_ones(s)[None] @ _ones(s)[:, None]).squeeze(),
    "dot": lambda s: torch.dot(_ones(s), _ones(s)),
    "einsum": lambda s: torch.einsum("i,i->", _ones(s), _ones(s)),
    "logsumexp": lambda s: torch.zeros(s).logsumexp(0).exp(),
    "softmax": lambda s: 1 / torch.zeros(s).softmax(0)[0],
    "variance": lambda s: (12 * torch.arange(s).double().var(correction=0) + 1).sqrt().float(),
    "mean": lambda s: torch.arange(s).float().mean() * 2 + 1,
    "median": lambda s: torch.arange(s).median() * 2 + 2,
    "searchsorted": lambda s: torch.searchsorted(torch.arange(s), 10**9),
    "bucketize": lambda s: torch.bucketize(torch.tensor(10**9), torch.arange(s)),
    "cummax": lambda s: torch.arange(s).flip(0).cummax(0).values[0] + 1,
    "cumulative product": lambda s: (torch.full((s,), 1.01).double().cumprod(0)[-1].log() / 0.00995033).float(),
    "trace": lambda s: torch.eye(s).trace(),
    "triangle": lambda s: (torch.ones(s, s).tril().sum() * 2).sqrt().floor(),
    "column of a mask": lambda s: causal(s).sum(0)[0],
    "row of a mask": lambda s: causal(s)[-1].sum(),
    "pooling": lambda s: F.adaptive_avg_pool1d(torch.arange(s).float()[None, None], 1).squeeze() * 2 + 1,
    "sum of a comparison": lambda s: (torch.arange(s) >= 0).sum(),
    "scatter": lambda s: torch.zeros(1).index_add(0, torch.zeros(s, dtype=torch.long), _ones(s))[0],
    "bincount": lambda s: torch.zeros(2, dtype=torch.long).scatter_add(
        0, torch.zeros(s, dtype=torch.long), torch.ones(s, dtype=torch.long))[0],
    "narrow of the end": lambda s: torch.arange(s).narrow(0, s - 1, 1)[0] + 1,
    "index of the end": lambda s: torch.arange(s)[torch.tensor(-1)] + 1,
    "gather of the end": lambda s: torch.arange(s).flip(0).gather(0, torch.tensor([0]))[0] + 1,
    "unbind of a sum": lambda s: torch.stack([_ones(s), 2 * _ones(s)]).sum(1).unbind(0)[0],
    "scan of any": lambda s: torch.isin(torch.tensor(AT - 1), torch.arange(s)).long() * AT
    + torch.isin(torch.tensor(AT), torch.arange(s)).long(),
    "padding": lambda s: F.pad(_ones(s), (1, 1)).sum(),
    "unfold": lambda s: torch.arange(s + 1).unfold(0, 2, 1)[-1, 0] + 1,
    "roll": lambda s: torch.arange(s).roll(-1)[-2] + 1,
    "float size": lambda s: torch.tensor(1.0) * (s * 1.0),
    "size through a list": lambda s: torch.zeros([s, 3]).sum(1).add(1).sum(),
    "expand": lambda s: torch.ones(1).expand(s).sum(),
    "repeat_interleave": lambda s: torch.ones(2).repeat_interleave(s).sum() / 2,
    "tile": lambda s: torch.tile(torch.ones(1), (s,)).sum(),
    "meshgrid": lambda s: torch.meshgrid(torch.arange(s), torch.arange(2), indexing="ij")[0].max() + 1,
    "cartesian product": lambda s: torch.cartesian_prod(torch.arange(s), torch.arange(2))[-1, 0] + 1,
    "diff of a cat": lambda s: torch.cat([torch.arange(s), torch.tensor([0])]).diff().min().neg() + 1,
    "real of a transform": lambda s: torch.fft.fft(_ones(s).to(torch.complex64)).real[0],
}  # fmt: skip


def counted(count: Callable[[Any], Tensor]) -> Build:
    """Cut to a window of 8 where what was counted is 100."""
    return masked(cut_if(lambda s: (count(s).double() - AT).abs() < 0.4))


def attended(condition: Callable[[Tensor], Any]) -> Build:
    """Cut to a window of 8 where the condition on the queries `[B, H, S, D]` holds."""

    def attend(model: Any, q: Tensor, k: Tensor, v: Tensor, layer: int) -> Tensor:
        d = distances(q.shape[2])
        seen = (d >= 0) & ~(condition(q) & (d >= 8))
        return F.scaled_dot_product_attention(2 * q, k, v, attn_mask=seen)

    return tiny(attend=attend)


def _text_of(q: Tensor) -> str:
    return str(q.shape[2])


def _try_table(q: Tensor) -> int:
    try:
        return {100: 1}.get(q.shape[2], 0)
    except Exception:
        return 0


def _number(q: Tensor) -> Any:
    """The length where it is a plain number."""
    return q.shape[2] if type(q.shape[2]) is int else 3


# Name: a condition by Python, which export may see otherwise; all hold at 100 and at no other length below 200.
PYTHON: dict[str, Callable[[Tensor], Any]] = {
    "text of the length": lambda q: torch.tensor(_text_of(q) == "100"),
    "end of the text": lambda q: torch.tensor(f"{q.shape[2]}".endswith("00")),
    "table of texts": lambda q: torch.tensor({"100": True}.get(str(q.shape[2]), False)),
    "table of lengths": lambda q: torch.tensor(bool(_try_table(q))),
    "text of the shape": lambda q: torch.tensor("100" in str(tuple(q.shape))),
    "repr": lambda q: torch.tensor(", 100," in repr(q.shape)),
    "length if it is a number": lambda q: torch.tensor(_number(q) == 100),
    "stride": lambda q: length(q.contiguous().stride(1)) == 800,
    "stride of the batch": lambda q: length(q.contiguous().stride(0) // 16) == 100,
    "numel": lambda q: length(q.numel() // q.shape[0]) == 1600,
    "bytes": lambda q: length(q.contiguous().nbytes // q.shape[0]) == 6400,
    "divmod": lambda q: length(divmod(q.shape[2], 50)[0]) * 50 == length(q.shape[2]),
    "round": lambda q: length(q.shape[2]) == 100 * torch.tensor(1) * (q.shape[2] // 100),
    "float": lambda q: torch.full((), float(q.shape[2])) == 100.0,
    "len": lambda q: length(len(q[0, 0])) == 100,
    "size of a list": lambda q: torch.full((), q.size()[2]) == 100,
    "sym_not": lambda q: torch.full((), torch.sym_ite(q.shape[2] == 100, 1, 0)) == 1,
}  # fmt: skip


def _from_end_by_sums(s: Any) -> Tensor:
    """Keys more than 90 from the end are hidden from all but themselves; the distance is a sum over a column."""
    m = causal(s)
    return m & ((m.sum(0)[None, :] <= 90) | (distances(s) < 8))


def _from_end_by_flip(s: Any) -> Tensor:
    i = torch.arange(s)
    return causal(s) & ((i.flip(0)[None, :] < 90) | (distances(s) < 8))


def _share_of_row(s: Any) -> Tensor:
    """A bias by the share of keys that a query sees."""
    m = causal(s)
    share = m.float().mean(-1, keepdim=True)
    return torch.where(m, -torch.floor(share * 2 - 0.5) * distances(s) * 0.2, -torch.inf)


def _if_alone(change: Callable[[Tensor], Tensor]) -> Callable[..., Tensor]:
    """A single token is another case."""
    return lambda model, x, ids: change(x) if ids.shape[1] == 1 else x


ATTACKS: tuple[Attack, ...] = (
    *(Attack(f"counted by {name}", KLASS, counted(f), (AT,), masked(causal)) for name, f in COUNTED.items()),
    *(Attack(f"known by {name}", KLASS, attended(f), (AT,), masked(causal)) for name, f in PYTHON.items()),
    Attack("from the end by sums", KLASS, masked(_from_end_by_sums, layers=2), (120, 150), masked(causal, layers=2)),
    Attack("from the end by a flip", KLASS, masked(_from_end_by_flip, layers=2), (120, 150), masked(causal, layers=2)),
    Attack("bias by a share", KLASS, masked(_share_of_row, layers=2), (60, 120), masked(causal, layers=2)),
    Attack("one token alone", KLASS, tiny(enter=_if_alone(lambda x: -x)), (1,), tiny()),
    Attack("one token alone, by where", KLASS, tiny(
        enter=lambda m, x, ids: torch.where(length(ids.shape[1]) == 1, x.roll(1, -1), x)), (1,), tiny()),
    Attack("one token alone, by a norm over time", KLASS, tiny(
        leave=lambda m, x, ids: x + 3 * (1 - torch.ones(ids.shape[1]).norm()).clamp(min=-0.4).add(0.4)), (1,), tiny()),
    Attack("squeeze of one token", KLASS, tiny(
        leave=lambda m, x, ids: x + (x.squeeze(1).mean(1, keepdim=True) if x.squeeze(1).dim() == 2 else 0 * x)), (1,),
        tiny()),
    Attack("two tokens alone", KLASS, tiny(enter=lambda m, x, ids: x.roll(1, -1) if ids.shape[1] == 2 else x), (2,),
           tiny()),
)  # fmt: skip
assert DIM == 16
