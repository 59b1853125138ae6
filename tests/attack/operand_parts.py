"""The parts of random chains: ops with an operand that acts as a weight, and what such an operand is made of.

In every text `t` is what the tokens are at first `[B, S, 6]`, `x` what the chain has made of them, `w` the operand, and
`m` the module with the parameters.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Op:
    """An op of `x` and `w`, which gives `[B, S, 6]` again.

    Attributes:
        kind: of `w`: "s" for a number, "v" for `[6]`, "m" for `[6, 6]`.
        text: what it computes.
        broadcasts: `w` may be `[B, S, 6]` or `[B, 1, 6]` as well.
    """

    kind: str
    text: str
    broadcasts: bool = False


_IDS = "(x[..., 0] * 3).abs().nan_to_num(0, 0, 0).clamp(0, 5).long()"  # [B, S]
_ROWS = "x.flatten(0, 1)"
_CHANNELS = "x.transpose(1, 2)"
_NORMED = "F.batch_norm(" + _CHANNELS + ", {}, {}, {}, {}).transpose(1, 2)"
_VAR = "m.vector.abs() + 1"

_WEIGHTS = [
    ("v", "F.layer_norm(x, (6,), w, m.vector)"),
    ("v", "F.layer_norm(x, (6,), m.vector, w)"),
    ("v", "torch.native_layer_norm(x, [6], w, None, 1e-5)[0]"),
    ("v", "F.rms_norm(x, (6,), w)"),
    ("v", "F.group_norm(x.flatten(0, 1), 2, w, m.vector).view_as(x)"),
    ("v", "F.group_norm(x.flatten(0, 1), 3, m.vector, w).view_as(x)"),
    ("v", _NORMED.format("w", _VAR, "m.vector", "m.vector")),
    ("v", _NORMED.format("m.vector", "w.abs() + 1", "m.vector", "m.vector")),
    ("v", _NORMED.format("m.vector", _VAR, "w", "m.vector")),
    ("v", _NORMED.format("m.vector", _VAR, "None", "w")),
    ("m", f"F.conv1d({_CHANNELS}, w[:, :, None]).transpose(1, 2)"),
    ("v", f"F.conv1d({_CHANNELS}, w[:, None, None], groups=6).transpose(1, 2)"),
    ("v", f"F.conv1d({_CHANNELS}, m.square[:, :, None], w).transpose(1, 2)"),
    ("m", f"F.conv2d({_CHANNELS}[..., None], w[:, :, None, None])[..., 0].transpose(1, 2)"),
    ("v", f"F.conv2d({_CHANNELS}[..., None], m.square[:, :, None, None], w)[..., 0].transpose(1, 2)"),
    ("m", f"F.conv_transpose1d({_CHANNELS}, w[:, :, None]).transpose(1, 2)"),
    ("v", "F.conv1d(x.flatten(0, 1)[:, None], w[None, None, :3], padding=1)[:, 0].view_as(x)"),
    ("m", "F.linear(x, w)"),
    ("v", "F.linear(x, m.square, w)"),
    ("m", "F.linear(x, m.square.T @ w)"),
    ("v", f"torch.addmm(w, {_ROWS}, m.square).view_as(x)"),
    ("m", f"torch.addmm(m.vector, {_ROWS}, w).view_as(x)"),
    ("m", f"torch.addmm(m.vector, {_ROWS}, w, beta=0.5, alpha=2.0).view_as(x)"),
    ("v", "torch.baddbmm(w, x, m.square.expand(x.size(0), 6, 6))"),
    ("m", "torch.baddbmm(m.vector, x, w.expand(x.size(0), 6, 6))"),
    ("v", f"F.prelu({_CHANNELS}, w).transpose(1, 2)"),
    ("v", f"F.prelu({_ROWS}, w).view_as(x)"),
    ("m", f"F.embedding({_IDS}, w)"),
    ("m", f"w[{_IDS}] + x"),
    ("m", f"x * w.index_select(0, {_IDS}.flatten()).view_as(x)"),
    ("m", f"w[:, 0].gather(0, {_IDS}.flatten()).view(x.shape[0], x.shape[1], 1) + x"),
    ("v", f"x + torch.gather(w.expand(x.shape), -1, {_IDS}[..., None])"),
    ("v", f"x + w[{_IDS}][..., None]"),
    ("v", f"x + torch.take(w, {_IDS})[..., None]"),
    ("m", f"F.one_hot({_IDS}, 6).to(torch.float64) @ w + x"),
    ("v", "torch.bucketize(x, w.sort().values).to(torch.float64)"),
    ("v", "torch.searchsorted(w.sort().values, x).to(torch.float64)"),
    ("m", "x @ w"),
    ("m", "torch.matmul(x, w.T)"),
    ("m", "x.bmm(w.expand(x.size(0), -1, -1))"),
    ("m", "torch.einsum('bsi,ij->bsj', x, w)"),
    ("m", "torch.einsum('bsi,bij->bsj', x, w[None].repeat(x.size(0), 1, 1))"),
    ("m", "torch.tensordot(x, w, dims=1)"),
    ("m", "torch.mm(x.reshape(-1, 6), w).reshape(x.shape)"),
    ("v", "x + (x @ w)[..., None]"),
    ("v", "x + torch.mv(x.reshape(-1, 6), w).reshape(x.shape[0], x.shape[1], 1)"),
    ("v", "x + torch.inner(x, w)[..., None]"),
    ("v", "torch.einsum('bsi,j->bsj', x, w)"),
    ("v", "torch.einsum('bsi,i->bsi', x, w)"),
    ("m", "torch.cdist(x, w.expand(x.size(0), 6, 6))"),
    ("m", "F.scaled_dot_product_attention(x, w.expand(x.size(0), 6, 6), m.table[:6].expand(x.size(0), 6, 6))"),
    ("m", "F.scaled_dot_product_attention(x, m.table[:6].expand(x.size(0), 6, 6), w.expand(x.size(0), 6, 6))"),
    ("m", "F.scaled_dot_product_attention(x[:, None], w[None, None], w[None, None])[:, 0]"),
    ("v", "(x @ m.square + w).softmax(-1) @ m.square"),
    ("m", "(x @ w).softmax(-1) @ m.square"),
    ("m", "(x @ m.square).softmax(-1) @ w"),
    ("m", "F.bilinear(x, x, w[None].expand(6, 6, 6), m.vector)"),
    ("s", "x.masked_fill(x > 0, w)"),
    ("s", "x * w"),
    ("s", "x.div(w.abs() + 1)"),
    ("s", "x.clamp(max=w)"),
    ("s", "torch.where(x > w, x, -x)"),
    ("s", "torch.where(w > 0.3, x, x * 2)"),
    ("s", "(x * w).softmax(-1)"),
    ("s", "x.roll(1, -1) + w.expand(x.shape)"),
    ("s", "x + torch.stack([w, w * 2]).sum()"),
    ("s", "x.masked_fill((x > 0) & (w > 0.3), 1.5)"),
    ("s", "torch.index_put(x, (torch.arange(1),), w) * 0 + x"),
    ("s", "x.index_fill(-1, torch.tensor([1, 4]), w)"),
]
_BESIDE = [
    "x + w", "x * w", "w - x", "x / (w.abs() + 1)", "torch.maximum(x, w)", "torch.minimum(w, x)", "torch.fmax(x, w)",
    "x.clamp(min=w)", "x.clamp(max=w)", "x.clamp(w, w + 1)", "torch.where(x > 0, x, w)", "torch.where(w > 0, x, -x)",
    "torch.lerp(x, m.vector, w)", "torch.lerp(x, w, 0.3)", "torch.lerp(w, x, m.vector)",
    "torch.addcmul(x, w, m.vector)", "torch.addcmul(m.vector, x, w)", "torch.addcmul(w, x, x, value=0.5)",
    "torch.addcdiv(x, w, m.vector.abs() + 1)", "torch.addcdiv(x, m.vector, w.abs() + 1)", "torch.atan2(x, w)",
    "torch.hypot(x, w)", "torch.copysign(x, w)", "torch.remainder(x, w.abs() + 0.5)", "torch.fmod(x, w.abs() + 0.5)",
    "torch.pow(x.abs() + 0.1, w.clamp(-2, 2))", "torch.xlogy(x, w.abs() + 1)", "torch.logaddexp(x, w)",
    "torch.nextafter(x, w)", "torch.heaviside(x, w)", "torch.polar(x.abs(), w.expand(x.shape)).real",
    "torch.complex(x, w.expand(x.shape)).abs()", "x.masked_fill(w > 0, 0.5)",
    "torch.cat([x, w.expand(x.shape)], -1)[..., 3:9]", "torch.stack([x, w.expand(x.shape)], -1).sum(-1)",
    "torch.gather(w.expand(x.shape), -1, x.argsort(-1))",
    "torch.scatter(x, -1, x.argsort(-1)[..., :2], w.expand(x.shape)[..., :2])",
    "torch.scatter_add(x, -1, x.argsort(-1)[..., :3], w.expand(x.shape)[..., :3])",
    "torch.slice_scatter(x, w.expand(x.shape)[..., :2], -1, 2, 4)",
    "torch.select_scatter(x, w.expand(x.shape)[..., 1], -1, 3)",
    "x.index_copy(-1, torch.tensor([0, 3]), w.expand(x.shape)[..., 1:3])",
    "x.index_add(-1, torch.tensor([5, 2]), w.expand(x.shape)[..., 1:3])",
    "torch.ops.aten.copy(x, w.expand(x.shape))", "x + torch.take_along_dim(w.expand(x.shape), x.argsort(-1), -1)",
    "x + F.cosine_similarity(x, w.expand(x.shape), -1)[..., None]", "x + torch.linalg.vecdot(x, w)[..., None]",
    "x * torch.sigmoid(w)", "x * (w > x)", "x.where(x < w, w)", "torch.isclose(x, w).to(torch.float64) + x",
    "torch.ldexp(x, (w * 2).clamp(-3, 3).long())", "torch.rsub(x, w)", "x.addcmul(w.tanh(), x)", "x + w.softmax(-1)",
    "x + F.layer_norm(w.expand(x.shape), (6,))",
    "torch.cross(x[..., :3], w.expand(x.shape)[..., 3:], -1).repeat(1, 1, 2)",
    "F.smooth_l1_loss(x, w.expand(x.shape), reduction='none')", "F.glu(torch.cat([x, w.expand(x.shape)], -1))",
]  # fmt: skip
OPS: list[Op] = [*(Op(kind, text) for kind, text in _WEIGHTS), *(Op("v", text, True) for text in _BESIDE)]

# Functions of one token.
PLAIN = [
    "F.gelu(x)", "x.tanh()", "F.silu(x)", "x * m.vector", "x @ m.square", "F.layer_norm(x, (6,), m.vector)",
    "x.softmax(-1)", "x.flip(-1)", "x.roll(2, -1)", "x.unflatten(-1, (2, 3)).transpose(-1, -2).flatten(-2)",
    "x.sort(-1).values", "x.cumsum(-1)", "x.flatten(0, 1).view_as(x)",
    "x.transpose(1, 2).contiguous().transpose(1, 2)", "F.normalize(x, dim=-1)", "x - x.mean(-1, keepdim=True)",
    "F.pad(x, (1, 2))[..., 1:7]", "x.clone()", "x.abs() + 0.1", "torch.cat([x[..., 3:], x[..., :3]], -1)",
    "torch.stack(x.unbind(-1)[::-1], -1)", "x.expand(2, -1, -1, -1)[1]", "x.clamp(-1, 1)",
    "F.linear(x, m.square, m.vector)", "x.float().double()", "x.view(x.size(0), -1, 3, 2).flatten(-2)",
    "x.repeat_interleave(2, -1)[..., ::2]", "x.unsqueeze(1).squeeze(1)", "x.permute(2, 0, 1).permute(1, 2, 0)",
]  # fmt: skip

# Functions of all tokens.
WHOLE = {
    "s": [
        "t.mean().abs()", "t.amax()", "t.norm()", "t.sum(1).sum()", "t.std()", "t[0, 0, 1]", "t[0, -1, 2]",
        "t.var()", "t.cumsum(1)[:, -1].mean()", "(t[..., 0] > 0.3).sum()", "(t[..., 0] == t[0, 0, 0]).sum() * 0.1",
        "t.flatten().median()", "t[..., 1].flatten().sort().values[0]", "t.logsumexp((0, 1, 2))",
        "t.amin((0, 1)).max()", "(t > 1.5).any().to(torch.float64)", "t.prod(1).mean()",
        "t[..., 0].argmax().remainder(5)", "x.mean()", "t.softmax(1).amax()", "x.abs().sum() * 0.1",
        "t.flatten().topk(2).values[1]", "torch.count_nonzero(t > 0) * 0.1",
        "t[:, :, 0].cummax(1).values[:, -1].sum()", "torch.linalg.vector_norm(x)", "t.flatten().kthvalue(2).values",
        "torch.dot(t.flatten(), t.flatten()) * 0.1", "t.nanmean()", "torch.dist(t, t * m.vector)",
    ],
    "v": [
        "t.mean((0, 1))", "t.amax((0, 1))", "t.norm(dim=(0, 1))", "t.sum((0, 1))", "t[0, 0]", "t[-1, -1]",
        "t[:, -1].mean(0)", "(t[..., :1].softmax(1) * t).sum((0, 1))", "t.cumsum(1)[:, -1].sum(0)",
        "(t > 0).sum((0, 1)).to(torch.float64)", "t.flatten(0, 1).median(0).values",
        "t.flatten(0, 1).sort(0).values[0]", "x.mean(1).mean(0)", "t.flatten(0, 1).std(0, correction=0)",
        "t.flatten(0, 1).logsumexp(0)", "t.flip(1)[0, 0]", "t.roll(1, 1)[0, 0]", "torch.einsum('bsi->i', t)",
        "t.flatten(0, 1).t() @ t[..., 0].flatten()", "x.amin(1)[0]", "t.select(1, 0).sum(0)",
        "t.flatten(0, 1).max(0).values", "t.narrow(1, 0, 1).mean((0, 1))",
        "x.diff(dim=1, prepend=x[:, :1]).sum((0, 1))", "t.flatten(0, 1).cumsum(0)[-1]", "t.transpose(0, 1)[0, 0]",
        "t.flatten(0, 1).index_select(0, torch.tensor([0]))[0]",
        "torch.zeros(6).double().index_add(0, (t[..., 0].flatten() * 2).abs().clamp(0, 5).long(), t[..., 1].flatten())",
        "torch.bincount((t[..., 0] * 2).abs().clamp(0, 5).long().flatten(), minlength=6).to(torch.float64)",
        "torch.histc(t, 6, -2, 2)",
    ],
    "m": [
        "t.flatten(0, 1).T @ t.flatten(0, 1) * 0.1", "torch.einsum('bsi,bsj->ij', t, t) * 0.1",
        "(t.transpose(1, 2) @ t).mean(0)", "torch.outer(t.mean((0, 1)), t.amax((0, 1)))", "t.flatten(0, 1).T.cov()",
        "(x.flatten(0, 1)[:, :, None] * t.flatten(0, 1)[:, None]).mean(0)", "t[0, :1].expand(6, 6)",
        "t[:, -1:].mean(0).repeat(6, 1)", "torch.tensordot(t, t, dims=([0, 1], [0, 1])) * 0.1",
    ],
}  # fmt: skip

# Operands `[B, S, 6]` or `[B, 1, 6]` of the other tokens, or of the other sequences.
SPREAD = [
    "t.mean(1, keepdim=True)", "t.amax(1, keepdim=True)", "t[:, :1]", "t[:, -1:]", "t.cumsum(1)", "t.flip(1)",
    "t.roll(1, 1)", "t.softmax(1)", "t.sort(1).values", "t.mean(0, keepdim=True)", "t.flip(0)",
    "t.norm(dim=1, keepdim=True)", "F.pad(t, (0, 0, 1, 0))[:, :-1]", "t.cummax(1).values",
    "t - t.mean(1, keepdim=True)", "t.argsort(1).double()", "F.normalize(t, dim=1)", "t.logcumsumexp(1)", "t[:1]",
    "torch.cat([t[:, 1:], t[:, :1]], 1)", "t.reshape(-1, 6).flip(0).view_as(t)",
    "F.avg_pool1d(t.transpose(1, 2), 3, 1, 1).transpose(1, 2)", "t.gather(1, torch.zeros_like(t).long())",
    "t.index_select(1, torch.zeros(t.size(1)).long())", "t.transpose(0, 1).reshape(t.shape)",
    "t.median(1, keepdim=True).values", "t[:, torch.arange(t.size(1)).flip(0)]",
    "t * torch.full((), t.size(1)).double()", "t.cumsum(0)", "x.flatten().roll(6).view_as(x)",
    "(t @ t.transpose(1, 2)).softmax(-1).sum(-1, keepdim=True)", "(t @ t.transpose(1, 2)) @ t",
    "t.view(-1).flip(0).view_as(t)",
]  # fmt: skip
OWN = [
    "t",
    "t * 2",
    "x",
    "t.flip(-1)",
    "t.mean(-1, keepdim=True)",
    "t.softmax(-1)",
    "t @ m.square",
    "t.tanh() + m.vector",
]

# What is done to a vector before it is used.
MOVES = [
    "w.flip(-1)", "w.roll(1, -1)", "F.pad(w, (1, 2))[..., 1:7]", "w.expand(w.shape)", "w.clone()", "w * 1.5",
    "w.abs()", "torch.cat([w[..., 4:], w[..., :4]], -1)", "w.unflatten(-1, (2, 3)).flatten(-2)", "w.sort(-1).values",
    "w.tanh()", "torch.stack(w.unbind(-1), -1)", "w[..., [5, 4, 3, 2, 1, 0]]",
    "w.repeat_interleave(2, -1)[..., ::2]", "w.cumsum(-1)", "w.unsqueeze(0).squeeze(0)", "w.narrow(-1, 0, 6)",
    "F.pad(w[..., 1:], (1, 0))", "torch.where(w > 0, w, w * 0.1)",
]  # fmt: skip
