"""The parts of random masks and positions, with places for a term that depends on the length.

In every text `s` is the length and `b` the batch size, both numbers or symbols; `n` is the length as a tensor, `i` and
`j` are the positions of queries `[S, 1]` and keys `[S]`, `d` their distance, `W` a small size, `A` a slope, `T` the
term (0 where there is none), `TABLE` 800 numbers, `M` the mask so far.
"""

from __future__ import annotations

# Whole numbers that are not the same at every length; `K` and `R` are drawn.
TERMS = [
    "s % K", "s // K", "(n == K).long()", "(n > K).long()", "(n < K).long()", "s * s % K", "(n >> R) & 1", "(n & R)",
    "torch.sym_max(0, s - K)", "torch.sym_min(s, K)", "torch.ones(s).sum().long() // K", "torch.arange(s).sum() % R",
    "j.max() // K", "torch.arange(s)[-1] // K", "(torch.arange(s) > K).any().long()", "b", "(n != K).long()",
    "torch.arange(s).flip(0)[0] // K", "(n.float().sqrt() % 1 == 0).long()", "n.float().log2().floor().long() // R",
    "((n & (n - 1)) == 0).long()", "(s - 1) // K", "torch.zeros(s // K + 1).shape[0] - 1",
    "(j.float().mean() * 2).long() // K", "torch.cat([j, j]).shape[0] // K", "(n % K == R).long()",
    "(s + K) % (K + R) // R", "torch.full((), s / K).floor().long()", "(n // K == R).long()",
    "(torch.ones(s).cumsum(0)[-1] > K).long()", "(n * n > K * K).long()", "n.clamp(max=K)", "(n - K).relu()",
    "(n - K).abs() // R", "((n > K) & (n < K + R)).long()", "(n % 2 == 0).long() * (n > K).long()",
    "(torch.arange(s) == K).sum()", "torch.sym_max(s, K) - K", "(n ^ K) % R", "(i >= j).sum() % R",
    "(d > K).long().amax()", "torch.arange(s).sort(descending=True).values[0] // K",
    "F.pad(torch.arange(s), (K, 0))[-1] // K", "s * K % R", "torch.tensor([0, 1, 0])[n % 3]",
    "TABLE.long()[n.clamp(max=799)].abs() % R", "b * s % K", "(n.bitwise_not() & R)",
]  # fmt: skip

CAUSAL = [
    "d >= 0", "j <= i", "i >= j", "torch.ones(s, s, dtype=torch.bool).tril()", "~torch.ones(s, s).triu(1).bool()",
    "torch.ones(s).cumsum(0)[:, None] > j", "~(j > i)", "d.sign() >= 0", "torch.arange(s).expand(s, s) <= i",
    "(i - j) > -1", "torch.full((s, s), 1.0).tril() == 1", "torch.logical_not(j.unsqueeze(0) > i)",
    "(j - i).clamp(min=0) == 0", "torch.tril(torch.ones((s, s))).bool()", "torch.ge(i, j)",
    "TABLE.new_ones(800, 800).tril().bool()[:s, :s]",
]  # fmt: skip
# Masks (bool) and biases, each right for the term 0; a causal mask is `M` there.
SHAPES = [
    "M", "M & (d < W)", "M & (d < W + T)", "M & (j > i - W - T)", "M & ~torch.ones(s, s).tril(-W).bool()",
    "M & (i // W == j // W)", "M & (i // (W + T) == j // (W + T))", "M & ((i + T) // W == (j + T) // W)",
    "torch.where(M, -A * d, -torch.inf)", "torch.where(M, -A * (1 + T) * d, -torch.inf)",
    "torch.where(M, A * (j + T), -torch.inf)", "torch.where(M, A * (j - s), -torch.inf)",
    "torch.where(M, TABLE[d.clamp(0, W)], -torch.inf)", "torch.where(M, TABLE[(d + T).clamp(0, 799)], -torch.inf)",
    "torch.where(M, TABLE[d.clamp(0, 799)] * (1 + T), -torch.inf)",
    "torch.where(M, (d * 0.3).sin() + T, -torch.inf)", "torch.where(M, (d % W) * A, -torch.inf)",
    "torch.where(M, (d.clamp(min=0) + 1.0).log() * -A, -torch.inf)", "M | (j < W)", "M | (j < W + T)",
    "M | ((i < W) & (j < W))", "M & ((j < W) | (d < 8 + T))", "M & ((d < W) | (d % 3 == 0))",
    "M & ((d + T) % 3 != 1) | (d == 0)", "(d >= 0) & (d * (1 + T) < W)", "(i + T >= j + T) & (d - T < W)",
    "(i >= j) & (j + W > i + T)", "torch.where(M, 0.0, -1e9)", "torch.where(M, 0.0, -1e9 * (1 + T))",
    "(~M).float() * torch.finfo(torch.float32).min",
    "torch.where(M & (d < W), -A * d, torch.finfo(torch.float32).min)",
    "torch.where(M, -A * (d // (1 + T)), -torch.inf)", "M & ((i - T) // W == (j - T) // W)",
    "M & (d <= W * (1 + T))", "torch.where(M, -A * d.clamp(max=W + T), -torch.inf)", "M & (i // W - j // W <= 1)",
    "torch.where(M, TABLE[i + j].abs() * -A, -torch.inf)", "M & (d < W) & (d < 3 * W + T)",
    "torch.where(M, ((i + T) % 4 == (j + T) % 4) * A, -torch.inf)", "torch.where(M, -A * d, -torch.inf) * (1 + T)",
    "torch.where((d < W + T), torch.where(M, 0.0, -torch.inf), -torch.inf)",
    "M & (d - torch.minimum(d, W + 0 * d) <= T)",
]  # fmt: skip
# What is done to a mask (bool) by a term; each is nothing for the term 0.
AFTER = [
    "M & ~((T > 0) & (d >= 8))", "M & ((T == 0) | (d < W))", "M | ((T > 0) & (d >= 0))", "M.roll(T, 0)",
    "M.roll((T, T), (0, 1))", "torch.where(T > 0, M & (d < W), M)", "M & (d + 0 * T >= 0)", "M & (d < 5000 - T)",
    "M & ((j >= T) | (d < 3))", "M & ~((T > 0) & (j == 0) & (d > 0))", "M & ((d * (T % 2)) % 2 == 0)",
    "M ^ ((T > 0) & (d > 2))", "M.index_select(0, (i[:, 0] - T).clamp(min=0))", "M & ((i < 100) | (d < 60 + T))",
    "torch.cat([M[:1], M[1:] & ((T == 0) | (d[1:] < 9))])", "F.pad(M, (T, 0))[:, :s]",
    "M & torch.where(T > 2, d < W, d >= 0)", "M.logical_and(d.le(s - T))",
    "M.gather(0, (i + 0 * j - T).clamp(min=0))", "M & ((d < W) | (T < 1))", "M.flip(0).flip(0) & (T * d < 50)",
    "torch.stack([M, M & (d < W)])[torch.as_tensor(T).clamp(0, 1)]", "M.triu(0 - s + T)",
    "M & ((j < s - T) | (d == 0))", "M & ((i >= T) | (d <= 1))", "M.masked_fill((T > 0) & (d > W), False)",
]  # fmt: skip

# Positions `[S]`, each as usual for the term 0.
POSITIONS = [
    "torch.arange(s)", "torch.arange(s) + T", "torch.ones(s).cumsum(0) - 1",
    "torch.ones(s).long().cumsum(0) - 1 + T", "torch.arange(W, s + W)", "torch.arange(T, s + T)", "TABLE[:s]",
    "TABLE[torch.arange(s)]", "TABLE[W:s + W]", "TABLE[torch.arange(s) + T]", "torch.arange(s).clamp(max=W)",
    "torch.arange(s).clamp(max=W + T)", "torch.arange(s) % W", "torch.arange(s) % (W + T)", "torch.arange(s) // W",
    "(torch.arange(s) + T) // W", "(d >= 0).sum(-1)", "((d >= 0) & (d < W)).sum(-1)", "(d >= T).sum(-1)",
    "(torch.arange(s) < W).cumsum(0)", "(torch.arange(s) < W + T).cumsum(0)", "torch.arange(s - 1, -1, -1).flip(0)",
    "torch.full((s,), 0.9).cumprod(0)", "torch.arange(s).sort().values", "torch.arange(0, 2 * s, 2)",
    "torch.arange(s).flip(0).flip(0)", "torch.cat([torch.arange(W), torch.arange(W, s + W)])[:s]",
    "F.pad(torch.arange(1, s), (1, 0))", "torch.arange(s).roll(T)", "torch.arange(s).gather(0, torch.arange(s))",
    "torch.arange(s).gather(0, (torch.arange(s) - T).clamp(min=0))", "j * (1 + T)",
    "torch.ones(s, s).tril().sum(-1)", "i[:, 0] * A", "(i[:, 0] + 1.0).log()", "(i[:, 0] * A).sin() + T",
    "TABLE.flip(0)[:s]", "torch.arange(s)[j]", "torch.arange(s).argsort()",
    "torch.arange(s) * (1 - 2 * torch.as_tensor(T % 2))", "torch.stack([j, j]).amax(0)", "j.repeat(2)[:s]",
    "TABLE.cumsum(0)[:s]", "torch.ones(b, s).cumsum(-1)", "torch.arange(s).expand(b, s) + T",
    "j.view(1, -1).repeat(b, 1)", "torch.arange(1, s + 1) - 1 - T", "torch.arange(0.0, s)",
    "torch.linspace(0, 1, 800)[:s]", "(j - W).relu()", "j.double().exp2().log2()",
    "torch.maximum(j, torch.full_like(j, W))", "j.unsqueeze(0).expand(b, -1) % W",
]  # fmt: skip
# What is done to positions `P` by a term.
MOVED = [
    "P + T", "P * (1 + T)", "P.roll(T, -1)", "P.clamp(max=W + T)", "torch.where(n == K, P.flip(-1), P)", "P - T",
    "P % (W + T)", "P // (1 + T)", "TABLE[(P + T).long().clamp(0, 799)]",
    "torch.where(torch.as_tensor(T) > 0, P * 0, P)", "P * (torch.as_tensor(T) < 1)", "P / (1 + T)", "P + (P == T)",
    "P * torch.where(P > T, 1, 2)", "P.cumsum(-1) + T", "P + TABLE[torch.as_tensor(T).clamp(0, 799)]", "P + 0 * T",
    "s - P - 1", "P - P.max()", "P / s", "torch.minimum(P, torch.as_tensor(T) + W)",
    "P ** (1 + (torch.as_tensor(T) > 0))", "P.index_select(-1, (j - T).clamp(min=0))",
    "torch.cat([P[..., :1], P[..., 1:] + T], -1)", "F.pad(P, (T, 0))[..., :s]", "P.sort(-1, descending=True).values",
    "P + (j >= s - T)",
]  # fmt: skip
