"""One small function of embedded tokens `x [B, S, 6]` for every op with an axis rule, and what the rules make of it.

`ACCEPTED` says which axes a result has; `REFUSED` says why there is no proof, for functions that return `[B, S, ...]`.
Whether the verdict is right is measured by `test_axis_rules.py`, which trusts none of this.
"""

import torch
import torch.nn.functional as F

aten = torch.ops.aten


def _ids(x):
    """Whole numbers 0 to 5 that depend on the token."""
    return x.argsort(-1)[..., :2]


def _filled(x):
    """Features that are assigned in place."""
    x = x.clone()
    x[..., :2] = 0
    x[..., 4] = x[..., 5].abs() + 1
    return x


def _beside(m, x, **given):
    """What each token makes of five constants."""
    return F.scaled_dot_product_attention(x, m.table[:5].expand(x.size(0), -1, -1), m.table[5:10], **given)


def _opened(x):
    """Constants that open up with the position."""
    return torch.arange(5) <= torch.arange(x.size(1))[:, None] // 2


def _own_heads(x):
    """Attention of each token's three heads to one another, in order."""
    heads = x.unflatten(-1, (3, 2))
    return F.scaled_dot_product_attention(heads, heads, heads, is_causal=True)


def _swapped(x):
    return x.transpose(1, 2)


def _sorted_experts(m, x):
    """Rows sorted by expert, worked on, and put back by the inverse of the sort."""
    rows = x.reshape(-1, 6)
    order = rows[:, 0].argsort()
    inverse = order.argsort()
    return (rows[order] * 2)[inverse].reshape(x.shape)


def _scattered_back(m, x):
    """The inverse of the sort by writing row numbers to where the rows went."""
    rows = x.reshape(-1, 6)
    order = rows[:, 0].sort().indices
    places = torch.empty_like(order)
    places[order] = torch.arange(order.shape[0])
    return (rows[order] @ m.square)[places].reshape(x.shape)


def _added_back(m, x):
    """Each token's two choices sorted by expert, and added to the token's row."""
    rows, choices = x.reshape(-1, 6), _ids(x).reshape(-1, 2)
    order = choices.flatten().argsort()
    worked = rows[order // 2] * 3
    return torch.zeros_like(rows).index_add(0, order // 2, worked).reshape(x.shape)


def _picked_and_added(m, x):
    """The rows that one expert is chosen for, as a loop over experts takes them."""
    rows = x.reshape(-1, 6)
    (chosen,) = torch.where(rows[:, 0] > 0)
    return torch.zeros_like(rows).index_add(0, chosen, rows[chosen] @ m.square).reshape(x.shape)


def _nonzero_columns(m, x):
    rows = x.reshape(-1, 6)
    chosen = (rows[:, 1] > 0).nonzero().squeeze(-1)
    return torch.zeros_like(rows).index_put((chosen,), rows[chosen], accumulate=True).reshape(x.shape)


def _grouped(m, x):
    rows = x.reshape(-1, 6)
    keys = rows.argmax(-1).clamp(max=3)
    order = keys.argsort()
    ends = torch.histc(keys.to(torch.float64), bins=4, min=0, max=3).cumsum(0).to(torch.int32)
    out = torch._grouped_mm(F.pad(rows, (0, 2))[order].bfloat16(), m.wide.bfloat16(), offs=ends)
    return out[order.argsort()].unflatten(0, x.shape[:2])


def _by_groups(m, x, keys=lambda choices: choices, turn=1):
    """Choices sorted by expert, split where the experts change, worked on by one matrix each, joined, and put back."""
    rows, choices = x.reshape(-1, 6), _ids(x).reshape(-1, 2)
    order = choices.flatten().argsort()
    sizes = F.one_hot(keys(choices), 6).sum((0, 1)).tolist()
    parts = [part * (1 + i) for i, part in enumerate(rows[order // 2].split(sizes))]
    return torch.zeros_like(rows).index_add(0, order // 2, torch.cat(parts[::turn])).reshape(x.shape)


def _counted_by_bincount(m, x):
    return x * torch.bincount(_ids(x).flatten(), minlength=6)


def _reversed_inverse(m, x):
    rows = x.reshape(-1, 6)
    order = rows[:, 0].argsort()
    return rows[order][order.argsort(descending=True)].reshape(x.shape)


def _without_inverse(m, x):
    rows = x.reshape(-1, 6)
    return rows[rows[:, 0].argsort()].reshape(x.shape)


def _undone_by_another_sort(m, x):
    rows = x.reshape(-1, 6)
    return rows[rows[:, 0].argsort()][rows[:, 1].argsort().argsort()].reshape(x.shape)


def _wrong_divisor(m, x):
    rows, choices = x.reshape(-1, 6), _ids(x).reshape(-1, 2)
    order = choices.flatten().argsort()
    return torch.zeros_like(rows).index_add(0, order // 2, rows[order // 3]).reshape(x.shape)


ACCEPTED = {
    # elementwise
    "add of a constant": (lambda m, x: x + m.vector, "B S 6"),
    "gelu": (lambda m, x: F.gelu(x), "B S 6"),
    "masked_fill": (lambda m, x: x.masked_fill(x > 0, 1.0), "B S 6"),
    "cast": (lambda m, x: x.float(), "B S 6"),
    "copy": (lambda m, x: aten.copy(torch.zeros_like(x), m.vector + x), "B S 6"),
    "clone": (lambda m, x: x.clone(), "B S 6"),
    "fill": (lambda m, x: _filled(x), "B S 6"),
    "polar": (lambda m, x: torch.polar(x.abs(), x).real, "B S 6"),
    "complex": (lambda m, x: torch.complex(x, -x).imag, "B S 6"),
    "as complex": (lambda m, x: torch.view_as_complex(x.reshape(*x.shape[:2], 3, 2)).abs(), "B S 3"),
    "as real": (lambda m, x: torch.view_as_real(torch.complex(x, x)), "B S 6 2"),
    "as real, copied": (lambda m, x: aten.view_as_real_copy(torch.complex(x, x)).sum(-1), "B S 6"),
    "logic": (lambda m, x: ((x > 0) & (x < 1) | (x > 2)) ^ (x < -1), "B S 6"),
    "logic by its old names": (
        lambda m, x: aten.__and__(x > 0, aten.__or__(x < 1, aten.__xor__(x > 2, x < 3))),
        "B S 6",
    ),
    "floor_divide": (lambda m, x: _ids(x) // 2, "B S 2"),
    "true_divide": (lambda m, x: torch.true_divide(x, m.vector), "B S 6"),
    "clamp": (lambda m, x: x.clamp(-1, 1), "B S 6"),
    "softplus": (lambda m, x: F.softplus(x), "B S 6"),
    "hardswish": (lambda m, x: F.hardswish(x), "B S 6"),
    "log_sigmoid": (lambda m, x: aten.log_sigmoid_forward(x)[0], "B S 6"),
    "rsub": (lambda m, x: aten.rsub.Tensor(x, m.vector), "B S 6"),
    "ldexp": (lambda m, x: torch.ldexp(x, _ids(x)[..., :1]), "B S 6"),
    "where": (lambda m, x: torch.where(x > 0, x, m.vector), "B S 6"),
    "prelu": (lambda m, x: F.prelu(_swapped(x), m.vector), "B 6 S"),
    "bucketize": (lambda m, x: torch.bucketize(x, m.table[:, 0].sort().values), "B S 6"),
    "added to positions": (lambda m, x: x + torch.arange(x.size(1))[:, None], "B S 6"),
    "positions times frequencies": (lambda m, x: x * torch.outer(torch.arange(x.size(1)), m.vector), "B S 6"),
    "added to rows of a table": (lambda m, x: x + m.table[: x.size(1)], "B S 6"),
    # moves
    "view": (lambda m, x: x.contiguous().view(x.size(0), x.size(1), 2, 3), "B S 2 3"),
    "reshape": (lambda m, x: x.reshape(x.size(0), x.size(1), 2, 3), "B S 2 3"),
    "flatten": (lambda m, x: x.flatten(0, 1), "B*S 6"),
    "flattened and back": (lambda m, x: x.reshape(-1, 3).reshape(x.size(0), x.size(1), 6), "B S 6"),
    "unflatten": (lambda m, x: x.unflatten(-1, (3, 2)), "B S 3 2"),
    "permute": (lambda m, x: x.permute(2, 0, 1), "6 B S"),
    "transpose": (lambda m, x: x.transpose(-1, -2), "B 6 S"),
    "unsqueeze": (lambda m, x: x.unsqueeze(-2), "B S 1 6"),
    "squeeze": (lambda m, x: x.unsqueeze(1).squeeze(1), "B S 6"),
    "expand": (lambda m, x: x.unsqueeze(1).expand(-1, 3, -1, -1), "B 3 S 6"),
    "a constant expanded over tokens": (lambda m, x: m.vector.expand(x.size(0), x.size(1), 6), "B S 6"),
    "repeat": (lambda m, x: x.repeat(1, 1, 2), "B S 12"),
    "repeat of a new dim": (lambda m, x: x.unsqueeze(1).repeat(1, 4, 1, 1), "B 4 S 6"),
    "repeat_interleave of features": (lambda m, x: x.repeat_interleave(2, dim=-1), "B S 12"),
    "repeat_interleave of tokens": (lambda m, x: x.repeat_interleave(2, dim=1), "B S*2 6"),
    "cat of features": (lambda m, x: torch.cat([x, x * 2], -1), "B S 12"),
    "stack": (lambda m, x: torch.stack([x, x * 2], 2), "B S 2 6"),
    "slice": (lambda m, x: x[..., 1:5:2], "B S 2"),
    "narrow": (lambda m, x: x.narrow(-1, 2, 3), "B S 3"),
    "unfold of features": (lambda m, x: x.unfold(-1, 3, 1), "B S 4 3"),
    "select": (lambda m, x: x[..., 3], "B S"),
    "split": (lambda m, x: x.split(4, -1)[1], "B S 2"),
    "split with sizes": (lambda m, x: x.split([1, 2, 3], -1)[2], "B S 3"),
    "chunk": (lambda m, x: x.chunk(2, -1)[0], "B S 3"),
    "tensor_split": (lambda m, x: torch.tensor_split(x, 3, -1)[1], "B S 2"),
    "unbind": (lambda m, x: x.unbind(-1)[2], "B S"),
    "slice_scatter": (lambda m, x: torch.slice_scatter(x, m.vector[:2].expand(*x.shape[:2], 2), -1, 1, 3), "B S 6"),
    "select_scatter": (lambda m, x: torch.select_scatter(x, x.sum(-1), -1, 2), "B S 6"),
    "pad of features": (lambda m, x: F.pad(x, (1, 2)), "B S 9"),
    "pad of features by a value": (lambda m, x: aten.constant_pad_nd(x, [0, 1], 2.0), "B S 7"),
    # reductions
    "sum": (lambda m, x: x.sum(-1), "B S"),
    "mean, dim kept": (lambda m, x: x.mean(-1, keepdim=True), "B S 1"),
    "amax": (lambda m, x: x.amax(-1) - x.amin(-1), "B S"),
    "max": (lambda m, x: x.max(-1).values - x.min(-1).values, "B S"),
    "maximum of two": (lambda m, x: torch.max(x, m.vector), "B S 6"),
    "argmax": (lambda m, x: x.argmax(-1) - x.argmin(-1), "B S"),
    "var": (lambda m, x: x.var(-1) + x.std(-1), "B S"),
    "var_mean": (lambda m, x: torch.var_mean(x, -1)[0], "B S"),
    "std_mean": (lambda m, x: torch.std_mean(x, -1)[1], "B S"),
    "norm": (lambda m, x: aten.norm.ScalarOpt_dim(x, 2, [-1]), "B S"),
    "vector norm": (lambda m, x: torch.linalg.vector_norm(x, dim=-1), "B S"),
    "logsumexp": (lambda m, x: x.logsumexp(-1), "B S"),
    "prod": (lambda m, x: x.prod(-1), "B S"),
    "any and all": (lambda m, x: (x > 0).any(-1) ^ (x > -1).all(-1), "B S"),
    "nansum": (lambda m, x: x.nansum(-1), "B S"),
    "median": (lambda m, x: x.median(-1).values, "B S"),
    "count_nonzero": (lambda m, x: torch.count_nonzero(x, -1), "B S"),
    "kthvalue": (lambda m, x: x.kthvalue(2, -1).values, "B S"),
    "mode": (lambda m, x: x.round().mode(-1).values, "B S"),
    # along a dim of features
    "softmax": (lambda m, x: x.softmax(-1), "B S 6"),
    "softmax by its inner name": (lambda m, x: aten._softmax(x, -1, False), "B S 6"),
    "softmax, safe": (lambda m, x: aten._safe_softmax(x, -1), "B S 6"),
    "log_softmax": (lambda m, x: x.log_softmax(-1), "B S 6"),
    "log_softmax by its inner name": (lambda m, x: aten._log_softmax(x, -1, False), "B S 6"),
    "cumsum": (lambda m, x: x.cumsum(-1), "B S 6"),
    "cumprod": (lambda m, x: x.cumprod(-1), "B S 6"),
    "cummax": (lambda m, x: x.cummax(-1).values + x.cummin(-1).values, "B S 6"),
    "logcumsumexp": (lambda m, x: x.logcumsumexp(-1), "B S 6"),
    "sort": (lambda m, x: x.sort(-1, descending=True).values, "B S 6"),
    "argsort": (lambda m, x: x.argsort(-1), "B S 6"),
    "topk": (lambda m, x: x.topk(2, -1).values, "B S 2"),
    "flip": (lambda m, x: x.flip(-1), "B S 6"),
    "roll": (lambda m, x: x.roll(1, -1), "B S 6"),
    "glu": (lambda m, x: F.glu(x, -1), "B S 3"),
    "Fourier over features": (lambda m, x: torch.fft.fft(x).abs() + torch.fft.ifft(x).abs(), "B S 6"),
    "real Fourier over features": (lambda m, x: torch.fft.irfft(torch.fft.rfft(x), n=6), "B S 6"),
    "pooled features": (lambda m, x: F.avg_pool1d(x, 2) + F.max_pool1d(x, 2) + F.adaptive_avg_pool1d(x, 3), "B S 3"),
    # norms
    "layer_norm": (lambda m, x: F.layer_norm(x, (6,), m.vector), "B S 6"),
    "layer_norm by its inner name": (lambda m, x: aten.native_layer_norm(x, [6], None, None, 1e-5)[0], "B S 6"),
    "rms_norm": (lambda m, x: F.rms_norm(x, (6,)), "B S 6"),
    "rms_norm, fused": (lambda m, x: aten._fused_rms_norm(x, [6], m.vector, 1e-5)[0], "B S 6"),
    "group_norm": (lambda m, x: F.group_norm(x.reshape(-1, 6), 2), "B*S 6"),
    "batch_norm": (lambda m, x: F.batch_norm(_swapped(x), m.vector, m.vector.exp()), "B 6 S"),
    # products
    "linear": (lambda m, x: F.linear(x, m.square, m.vector), "B S 6"),
    "matmul": (lambda m, x: x @ m.square, "B S 6"),
    "matrix times tokens": (lambda m, x: m.square @ _swapped(x), "B 6 S"),
    "mm": (lambda m, x: torch.mm(x.reshape(-1, 6), m.square), "B*S 6"),
    "bmm": (lambda m, x: torch.bmm(x.reshape(1, -1, 6).expand(4, -1, -1), m.experts), "4 B*S 6"),
    "addmm": (lambda m, x: torch.addmm(m.vector, x.reshape(-1, 6), m.square), "B*S 6"),
    "baddbmm": (
        lambda m, x: torch.baddbmm(m.experts[:, :1], x.reshape(1, -1, 6).expand(4, -1, -1), m.experts),
        "4 B*S 6",
    ),
    "mv": (lambda m, x: torch.mv(x.reshape(-1, 6), m.vector), "B*S"),
    "matmul with a vector": (lambda m, x: x @ m.vector, "B S"),
    "einsum over experts": (lambda m, x: torch.einsum("bse,nef->bsnf", x, m.experts), "B S 4 6"),
    "product of a token's own heads": (
        lambda m, x: x.unflatten(-1, (2, 3)) @ x.unflatten(-1, (3, 2)),
        "B S 2 2",
    ),
    "conv of width 1": (lambda m, x: F.conv1d(_swapped(x), m.square[..., None]), "B 6 S"),
    "conv of width 1 in two dims": (
        lambda m, x: F.conv2d(_swapped(x)[..., None], m.square[..., None, None]),
        "B 6 S 1",
    ),
    # by index
    "embedding": (lambda m, x: F.embedding(_ids(x), m.table), "B S 2 6"),
    "embedding of positions": (lambda m, x: F.embedding(torch.arange(x.size(1)), m.table) + x, "B S 6"),
    "index_select of features": (lambda m, x: x.index_select(-1, torch.tensor([0, 3])), "B S 2"),
    "index_select of a table": (lambda m, x: m.table.index_select(0, _ids(x)[..., 0].reshape(-1)), "B*S 6"),
    "index of a table": (lambda m, x: m.table[_ids(x), 1], "B S 2"),
    "index of features": (lambda m, x: x[:, :, torch.tensor([5, 0, 2])], "B S 3"),
    "gather": (lambda m, x: x.gather(-1, _ids(x)), "B S 2"),
    "scatter": (lambda m, x: torch.zeros_like(x).scatter(-1, _ids(x), 1.0), "B S 6"),
    "scatter_add": (lambda m, x: x.scatter_add(-1, _ids(x), x[..., :2]), "B S 6"),
    "scatter_reduce": (lambda m, x: x.scatter_reduce(-1, _ids(x), x[..., :2], "amax"), "B S 6"),
    "one_hot": (lambda m, x: F.one_hot(_ids(x), 6), "B S 2 6"),
    # made of one number
    "filled": (
        lambda m, x: x + torch.zeros(x.size(1), 1) + torch.ones(x.size(0), 1, 1) + torch.full((6,), 2.0),
        "B S 6",
    ),
    "empty, then filled": (lambda m, x: x + torch.empty(x.size(1), 1).fill_(2.0) + torch.scalar_tensor(3.0), "B S 6"),
    # rows of tokens, there and back
    "experts by sort and its inverse": (_sorted_experts, "B S 6"),
    "experts by sort and places": (_scattered_back, "B S 6"),
    "experts by sort and index_add": (_added_back, "B S 6"),
    "experts by where": (_picked_and_added, "B S 6"),
    "experts by nonzero and index_put": (_nonzero_columns, "B S 6"),
    "experts by a grouped product": (_grouped, "B S 8"),
    "experts by groups": (_by_groups, "B S 6"),
    # attentions without a cache
    "attention to constants": (lambda m, x: _beside(m, x), "B S 6"),
    "attention to constants that open up": (lambda m, x: _beside(m, x, attn_mask=_opened(x)), "B S 6"),
    "attention of a token's own heads": (lambda m, x: _own_heads(x), "B S 3 2"),
}

REFUSED = {
    "causal attention to constants": (lambda m, x: _beside(m, x, is_causal=True), "place of their query"),
    # tokens with tokens
    "mean over tokens": (lambda m, x: x - x.mean(1, keepdim=True), "works along the token axis"),
    "mean over sequences": (lambda m, x: x - x.mean(0, keepdim=True), "works along the batch"),
    "sum of everything": (lambda m, x: x - x.sum(), "works along the batch"),
    "cumsum over tokens": (lambda m, x: x.cumsum(1), "works along the token axis"),
    "softmax over tokens": (lambda m, x: x.softmax(1), "works along the token axis"),
    "Fourier over tokens": (lambda m, x: torch.fft.fft(x, dim=1).real, "works along the token axis"),
    "pooled tokens": (lambda m, x: _swapped(F.avg_pool1d(_swapped(x), 3, 1, 1)), "works along the token axis"),
    "sort of tokens": (lambda m, x: x.sort(1).values, "works along the token axis"),
    "flip of tokens": (lambda m, x: x.flip(1), "works along the token axis"),
    "flip of sequences": (lambda m, x: x.flip(0), "works along the batch"),
    "roll of tokens": (lambda m, x: x.roll(1, 1), "works along the token axis"),
    "roll of everything": (lambda m, x: x.roll(1), "works along the batch"),
    "roll by the length": (lambda m, x: x.roll(x.size(1), -1), "computes with the batch size or the length"),
    "layer_norm of channels and tokens": (lambda m, x: F.instance_norm(_swapped(x)).transpose(1, 2), ""),
    "group_norm over tokens": (lambda m, x: _swapped(F.group_norm(_swapped(x), 2)), "works along the token axis"),
    "batch_norm in training": (
        lambda m, x: _swapped(F.batch_norm(_swapped(x), None, None, training=True)),
        "",
    ),
    "tokens times tokens": (lambda m, x: x @ x.mT @ x, "multiplies tokens with tokens"),
    "linear attention": (lambda m, x: x @ (x.mT @ x), "sums over the tokens"),
    "sum of the rows of a table": (lambda m, x: x + m.table[: x.size(1)].sum(0), "works along the token axis"),
    "attention left alone": (lambda m, x: F.scaled_dot_product_attention(x, x, x), "attention that was not recognised"),
    "shift by pad": (lambda m, x: F.pad(x, (0, 0, 1, 0))[:, :-1], "pads, and so shifts, the token axis"),
    "shift by cat": (lambda m, x: torch.cat([x[:, 1:], x[:, :1]], 1), "takes a part of the sequence"),
    "twice the sequence": (lambda m, x: torch.cat([x, x], 1).unflatten(1, (2, -1)).sum(1), "along the token axis"),
    "repeated sequence": (lambda m, x: x.repeat(1, 2, 1).unflatten(1, (-1, 2)).sum(2), "repeats the sequence"),
    "first token": (lambda m, x: x + x[:, :1], "takes a part of the sequence"),
    "one token": (lambda m, x: x + x.select(1, 2)[:, None], "picks out one token or one sequence"),
    "one sequence": (lambda m, x: x + x[1], "picks out one token or one sequence"),
    "split of the sequence": (lambda m, x: x - x.split([1, x.size(1) - 1], 1)[0], "splits the sequence"),
    "written token": (lambda m, x: torch.slice_scatter(x, x[:, :2], 1, 1, 3), ""),
    "convolution": (
        lambda m, x: _swapped(F.conv1d(_swapped(x), m.experts[:3].permute(1, 2, 0), padding=1)),
        "convolution",
    ),
    "convolution, tokens as one long row": (
        lambda m, x: x + F.conv1d(x.reshape(-1, 6).t(), m.square[..., None]).sum(1),
        "channels are no features",
    ),
    "tokens picked by a sort": (lambda m, x: x.gather(1, x.argsort(1)), "works along the token axis"),
    "tokens picked by index": (lambda m, x: x[:, torch.arange(x.size(1)).flip(0)], ""),
    "tokens picked by constant index": (lambda m, x: x - x.index_select(1, torch.tensor([0])), "picks tokens by index"),
    "written along the tokens": (lambda m, x: x.scatter_add(1, torch.zeros_like(_ids(x)), x[..., :2]), ""),
    "entries chosen by a mask": (lambda m, x: x - x[x > 0].sum(), "selects entries by a mask"),
    "wrong view": (lambda m, x: x.reshape(x.size(1), x.size(0), 6).transpose(0, 1), "reshapes across the batch axis"),
    "wrong view of heads": (
        lambda m, x: x.unflatten(-1, (2, 3)).transpose(1, 2).reshape(x.size(0), x.size(1), 6),
        "reshapes across the plain axis",
    ),
    # rows that do not go back to where they came from
    "sorted and never put back": (_without_inverse, "reshapes across the picked axis"),
    "put back by the reversed inverse": (_reversed_inverse, "along the token axis"),
    "put back by the inverse of another sort": (_undone_by_another_sort, "along the token axis"),
    "added back to other rows": (_wrong_divisor, ""),
    "groups of other keys": (
        lambda m, x: _by_groups(m, x, lambda choices: 5 - choices),
        "splits groups of tokens whose bounds",
    ),
    "groups joined in another order": (lambda m, x: _by_groups(m, x, turn=-1), "joins tensors along the token axis"),
    "counts over all tokens": (_counted_by_bincount, "counts over all tokens"),
    # functions of the length or of the batch
    "divided by the length": (lambda m, x: x / x.size(1), "computes with the batch size or the length"),
    "features up to the length": (
        lambda m, x: x + x.repeat(1, 1, 11)[..., : x.size(1)].sum(-1, keepdim=True),
        "whose size is the batch size or the length",
    ),
    "a feature that the length picks": (
        lambda m, x: x + x.repeat(1, 1, 11).narrow(-1, x.size(1) - 2, 1),
        "takes a part that depends on the batch size or the length",
    ),
    "last row of a table": (lambda m, x: x + m.table.narrow(0, x.size(1) - 1, 1), "a part that depends on"),
    "end of a table": (lambda m, x: x + m.table[-x.size(1) :].sum(0), ""),
    "repeated as often as the length": (
        lambda m, x: x + x.repeat(1, 1, x.size(1)).sum(-1, keepdim=True),
        "whose size is the batch size or the length",
    ),
    "padded by the length": (lambda m, x: x + F.pad(x, (0, x.size(1))).mean(-1, keepdim=True), ""),
    "written where the length says": (
        lambda m, x: torch.slice_scatter(x.repeat(1, 1, 11), x[..., :1] * 0, -1, x.size(1) - 2, x.size(1) - 1),
        "a part that depends on the batch size or the length",
    ),
    "bounds of buckets from the length": (
        lambda m, x: torch.bucketize(x * 5, torch.arange(x.size(1)).double()),
        "takes its boundaries from positions, or in the size of the sequence",
    ),
    "positions from the end": (lambda m, x: x + torch.arange(x.size(1)).flip(0)[:, None], "works along the token axis"),
    "number of the sequence": (lambda m, x: x + torch.arange(x.size(0))[:, None, None], ""),
    "random numbers": (lambda m, x: x + torch.rand_like(x), "draws random numbers"),
}
