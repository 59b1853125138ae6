"""Where batch and length are said to be extents alone, every tensor is the corner of every larger one.

Each row is a spelling, and whether its entries are functions of their places. What is claimed is held against brute
force, at every length up to 40 and batches of up to 3; so are other tensors than masks, whatever their shape.
"""

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from kvpass.fx_passes.graph import shape_of
from kvpass.fx_passes.symbolic.extents import depends_on_extent_only
from tests.fx_passes.mask_tracing import TracedMask

Spelling = Callable[[int, int], Tensor]
TABLE = torch.arange(600).reshape(60, 10) % 7
VECTOR = torch.tensor([3, 1, 4, 1, 5, 9, 2, 6])


def i(s: int) -> Tensor:
    return torch.arange(s)


def d(s: int) -> Tensor:
    return i(s)[:, None] - i(s)


def length(s: int) -> Tensor:
    return torch.full((), s)


def ones(s: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.ones(s, dtype=dtype)


def joined(b: int, s: int) -> Tensor:
    """Batch and length in one dim, and apart again."""
    return i(s).expand(b, s).reshape(b * s).reshape(b, s)


LOCAL: dict[str, Spelling] = {
    "arange": lambda b, s: i(s),
    "arange from a start in steps": lambda b, s: torch.arange(5, 5 + 3 * s, 3),
    "arange downwards": lambda b, s: torch.arange(0, -s, -1),
    "arange of halves": lambda b, s: torch.arange(0, s * 0.5, 0.5, dtype=torch.float64)[:s],
    "zeros": lambda b, s: torch.zeros(s, s),
    "full": lambda b, s: torch.full((b, s), 7.0),
    "full_like": lambda b, s: torch.full_like(d(s), 3),
    "new_ones": lambda b, s: d(s).new_ones(s, 4),
    "eye": lambda b, s: torch.eye(s),
    "distances": lambda b, s: d(s),
    "causal": lambda b, s: d(s) >= 0,
    "causal for a batch": lambda b, s: (d(s) >= 0).expand(b, 1, s, s),
    "squares and roots": lambda b, s: (i(s).float() + 1).sqrt() * d(s) ** 2,
    "where": lambda b, s: torch.where(d(s) >= 0, 0.0, -torch.inf),
    "masked_fill": lambda b, s: d(s).float().masked_fill(d(s) < 0, -1e9),
    "wraps": lambda b, s: (d(s) * 2**56 >= 0) & (d(s).to(torch.int8) >= 0),
    "bits": lambda b, s: (i(s) ^ 5) & (i(s) >> 2),
    "a size as extent": lambda b, s: torch.ones(s // 3 + 1) * 2,
    "tril": lambda b, s: torch.ones(s, s).tril(),
    "triu behind a diagonal": lambda b, s: torch.full((s, s), -torch.inf).triu(-4),
    "transposed": lambda b, s: d(s).t() + d(s).transpose(0, 1) + d(s).permute(1, 0),
    "unsqueezed and squeezed": lambda b, s: d(s)[None, :, None].squeeze(2).squeeze(0),
    "slice from a start": lambda b, s: torch.arange(s + 9)[4 : s + 4],
    "slice of a table": lambda b, s: TABLE[3 : s + 3, 2],
    "slice of the end of a table": lambda b, s: TABLE[-50:][:s],
    "every second": lambda b, s: torch.arange(2 * s)[1::2],
    "first row": lambda b, s: d(s)[0],
    "last column of a table": lambda b, s: TABLE[:s, -1],
    "narrow": lambda b, s: torch.arange(s + 9).narrow(0, 2, s),
    "cat behind a constant": lambda b, s: torch.cat([VECTOR, i(s)]),
    "stack": lambda b, s: torch.stack([i(s), i(s) * 2], -1),
    "interleaved by a reshape": lambda b, s: torch.stack([i(s), -i(s)], -1).reshape(2 * s),
    "pairs by a view": lambda b, s: torch.arange(4 * s).view(s, 2, 2),
    "flip of a constant dim": lambda b, s: torch.stack([i(s), i(s) * 2]).flip(0),
    "flip where all are equal": lambda b, s: i(s).expand(s, s).flip(0),
    "roll by nothing": lambda b, s: torch.roll(d(s), 0, 0),
    "roll of a constant dim": lambda b, s: TABLE[:s].roll(3, 1),
    "repeat of a pattern": lambda b, s: torch.tensor([1, 0, 2]).repeat(s),
    "repeat for a batch": lambda b, s: d(s).repeat(b, 1, 1),
    "repeat_interleave": lambda b, s: i(s).repeat_interleave(3),
    "pad in front": lambda b, s: F.pad(d(s), (2, 0, 1, 0)),
    "cropped in front": lambda b, s: F.pad(torch.arange(s + 5), (-3, 0)),
    "diagonal": lambda b, s: (d(s) * 3 + i(s)).diagonal(),
    "table by places": lambda b, s: TABLE[i(s)],
    "table by places from before": lambda b, s: TABLE[i(s) - 5, 1],
    "mask by places": lambda b, s: (d(s) >= 0)[i(s)[:, None], i(s)],
    "places of a batch, all alike": lambda b, s: d(s).expand(b, s, s)[torch.arange(b)[:, None], i(s)],
    "index_select": lambda b, s: d(s).index_select(0, i(s)),
    "gather": lambda b, s: d(s).gather(1, i(s)[:, None].expand(s, s)),
    "embedding": lambda b, s: F.embedding((i(s) // 3).clamp(max=59), TABLE.float()),
    "one_hot": lambda b, s: F.one_hot(i(s) % 5, 5),
    "bucketize": lambda b, s: torch.bucketize(d(s), torch.tensor([0, 3, 9])),
    "cumsum": lambda b, s: (i(s) % 3).cumsum(0),
    "cumprod": lambda b, s: torch.full((s,), 0.5).cumprod(0),
    "cummax": lambda b, s: (i(s) % 7).cummax(0).values,
    "diff": lambda b, s: (i(s) ** 2).diff(prepend=torch.tensor([0])),
    "sum over a constant dim": lambda b, s: (i(s)[:, None] * VECTOR).sum(-1),
    "any over a constant dim": lambda b, s: (i(s)[:, None] == VECTOR).any(-1),
    "largest over a constant dim": lambda b, s: (i(s)[:, None] * VECTOR).max(-1).values,
    "any where all are equal": lambda b, s: (i(s) > 3).expand(s, s).any(0),
    "number of keys that are seen": lambda b, s: (d(s) >= 0).sum(-1),
    "number of keys in a window": lambda b, s: ((d(s) >= 0) & (d(s) < 9)).sum(-1, keepdim=True) + i(s),
    "written to": lambda b, s: d(s).slice_scatter(torch.ones(s, 2).long(), 1, 0, 2).select_scatter(i(s), 0, 1),
    "outer": lambda b, s: torch.outer(i(s), i(s)),
    "windows of a row": lambda b, s: torch.arange(s + 2).unfold(0, 3, 1),
    "parts of a constant dim": lambda b, s: TABLE[:s].split([3, 7], 1)[1] + TABLE[:s].unbind(1)[2][:, None],
    "complex": lambda b, s: torch.view_as_real(torch.polar(ones(s), i(s).float())),
}

TAINTED: dict[str, Spelling] = {
    "the length": lambda b, s: torch.full((s,), s),
    "the batch": lambda b, s: torch.full((s,), b),
    "compared with the length": lambda b, s: i(s) < s // 2,
    "length as a tensor": lambda b, s: i(s) * (length(s) % 60 != 7),
    "arange from the length": lambda b, s: torch.arange(s, 2 * s),
    "arange in steps of it": lambda b, s: torch.arange(0, s * s, s),
    "arange of bfloat16": lambda b, s: torch.arange(s, dtype=torch.bfloat16),
    "share of the length": lambda b, s: i(s) / s,
    "flip": lambda b, s: i(s).flip(0),
    "flip of a mask": lambda b, s: d(s).flip(1),
    "roll": lambda b, s: i(s).roll(1),
    "roll of all": lambda b, s: (i(4)[:, None] + 0 * i(s)).expand(4, s).roll(1),
    "roll by it": lambda b, s: TABLE.roll(s, 0)[:s],
    "sort": lambda b, s: (-i(s)).sort().values,
    "argsort": lambda b, s: (-i(s)).argsort(),
    "last": lambda b, s: i(s)[-1] + i(s),
    "last rows": lambda b, s: torch.arange(s + 9)[-s:],
    "last rows of a table": lambda b, s: TABLE[-s:],
    "slice from the middle": lambda b, s: torch.arange(2 * s)[s // 2 :][:s],
    "steps of it": lambda b, s: torch.arange(s * (s // 8 + 1))[:: s // 8 + 1][:s],
    "row of the middle": lambda b, s: d(s).select(0, s // 2),
    "table at the length": lambda b, s: TABLE.select(0, s).sum() + i(s),
    "joined behind the places": lambda b, s: torch.cat([i(s), VECTOR]),
    "pad behind": lambda b, s: F.pad(ones(s), (0, 3)),
    "pad by it": lambda b, s: F.pad(VECTOR, (s // 8, 0)),
    "sum": lambda b, s: ones(s).sum() + i(s),
    "sum of rows": lambda b, s: (d(s) >= 0).sum(0),
    "mean": lambda b, s: (d(s) >= 0).float().mean(-1),
    "largest": lambda b, s: i(s).max() + i(s),
    "largest of each row": lambda b, s: d(s).amax(0),
    "any": lambda b, s: (i(s) == 20).any() | (i(s) < 0),
    "any of what may be nothing": lambda b, s: torch.ones(s // 8).any() | (i(s) < 0),
    "all": lambda b, s: (i(s) < 20).all() | (i(s) < 0),
    "place of the largest": lambda b, s: i(s).argmax() + i(s),
    "product with ones": lambda b, s: torch.ones(s, s) @ ones(s),
    "norm": lambda b, s: ones(s).norm() + i(s),
    "softmax": lambda b, s: torch.zeros(s).softmax(0),
    "triangle along it": lambda b, s: torch.ones(s, s).triu(s // 2),
    "places from the end by index": lambda b, s: i(s)[torch.tensor([-1])] + i(s),
    "places from the end, computed": lambda b, s: i(s)[i(s) - 1],
    "pattern of that size": lambda b, s: i(s).repeat(2),
    "columns of that size": lambda b, s: d(s).reshape(s * s),
    "batch and length merged": joined,
    "rows that alternate": lambda b, s: torch.arange(s * 2).view(2, s),
    "repeated by it": lambda b, s: VECTOR.repeat_interleave(s // 8 + 1),
    "written to the end": lambda b, s: d(s).select_scatter(i(s), 0, -1),
    "bits of halves": lambda b, s: i(s).view(torch.int32).view(s, 2)[:, 0] * 0 + i(s),
    "number of the sequence": lambda b, s: torch.arange(b)[:, None] * ones(s),
    "scatter": lambda b, s: torch.zeros(s).scatter(0, i(s).flip(0), i(s).float()),
    "isin": lambda b, s: torch.isin(torch.tensor(20), i(s)) | (i(s) < 0),
    "distances by cdist": lambda b, s: torch.cdist(i(s)[:, None].float(), i(s)[:, None].float()),
    "a mask by values": lambda b, s: i(s)[(i(s) >= 0)].sum() + i(s),
}


def corners_agree(mask: TracedMask) -> bool:
    """Whether the values are functions of their places, equal for all sequences, at every size up to 40 tokens."""
    largest = mask.evaluate(3, 40)
    dims = [d for d, size in enumerate(shape_of(mask.bias)) if size == mask.captured.batch]
    for batch in (1, 2, 3):
        for tokens in range(2, 41):
            value = mask.evaluate(batch, tokens)
            corner = largest
            for dim, size in enumerate(value.shape):
                corner = corner.narrow(dim, 0, size)
                if dim in dims and not torch.equal(value.narrow(dim, 0, 1).expand_as(value), value):
                    return False
            if not torch.equal(corner, value):
                return False
    return True


@pytest.mark.sampled(3)
@pytest.mark.parametrize("name", LOCAL)
def test_what_depends_on_its_place_alone(name: str) -> None:
    mask = TracedMask(LOCAL[name])
    reason = depends_on_extent_only(mask.evaluator, mask.bias)
    assert corners_agree(mask)
    known = (mask.captured.length, mask.captured.batch)
    if any(not size.is_number and size not in known for size in shape_of(mask.bias)):
        assert reason is None or reason.startswith("it has a dim of")
    else:
        assert reason is None


@pytest.mark.parametrize("name", TAINTED)
def test_what_a_size_takes_part_in(name: str) -> None:
    mask = TracedMask(TAINTED[name])
    reason = depends_on_extent_only(mask.evaluator, mask.bias)
    assert reason is not None
