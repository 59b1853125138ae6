"""What the attention ops take, mean and give: their docstrings, argument checks and shape functions.

Words common to all of them:

step
    T query rows ``[T, Hq, D]`` of N sequences, with int64 ``block_tables [N, W]``, ``seq_lens [N]`` and ``query_start
    [N + 1]``. The rows from ``query_start[n]`` to before ``query_start[n + 1]`` are the newest tokens of sequence n,
    which is ``seq_lens[n]`` long with them; their keys and values are in the cache already.
caches
    ``[B, Hkv, P, W]`` in a format of :mod:`kvpass.kernels.formats.cache_formats`, contiguous. A format's name may be
    left out for the float formats. Keys and values may differ in format. Slots past a sequence's end, and entries of
    its block table past its end, may hold anything, NaN included. In k4v2 a negative entry is a wide block, see
    :mod:`kvpass.kernels.formats.settling`.
features
    Row ``t`` of sequence n has position ``q = seq_lens[n] - (query_start[n + 1] - query_start[n]) + t -
    query_start[n]``. It sees keys ``k <= q`` with ``q - k < window``, ``k // chunk == q // chunk``, and a bias that is
    not ``-inf``. Scores are ``softcap(scale * q.k) - slopes[h] * (q - k) + bias[h, ...]``, with ``softcap(x) = c *
    tanh(x / c)``. A sink is one more logit of a head in the denominator, with no value. Query head h reads KV head
    ``h // (Hq // Hkv)``. A row that sees nothing gives zeros.
precision
    Scores, softmax and sums are float32 (float64 for a float64 query). The scale of a stored key multiplies its score,
    that of a stored value its weight.
"""

from __future__ import annotations

import torch
from torch import Tensor

from kvpass.kernels.call_checks import (
    check_features,
    check_floats,
    check_heads,
    check_rank,
    check_step,
    check_tree,
    check_whole,
    find_form,
    find_pair,
)


def fake_dense_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    bias: Tensor | None,
    scale: float,
    softcap: float | None = None,
    sinks: Tensor | None = None,
) -> Tensor:
    """Attention over whole sequences: the one form into which passes rewrite every spelling of attention.

    Query head h reads KV head ``h // (Hq // Hkv)``. Scores are ``softcap * tanh(scale * q.k / softcap) + bias``, or
    ``scale * q.k + bias`` without a softcap. A sink is one more logit in the denominator, with no value. Scores and
    softmax are float32, or float64 for float64 inputs.

    Args:
        query: ``[N, Hq, Sq, D]``; Hq is a multiple of Hkv.
        key: ``[N, Hkv, Sk, D]``.
        value: ``[N, Hkv, Sk, Dv]``.
        bias: float, broadcastable to ``[N, Hq, Sq, Sk]``; ``-inf`` hides a key.
        scale: factor of ``q.k``.
        softcap: bound of the scores before the bias.
        sinks: ``[Hq]``.

    Returns:
        ``[N, Hq, Sq, Dv]`` in the query's dtype; zeros where nothing is visible.
    """
    for name, tensor in (("query", query), ("key", key), ("value", value)):
        check_rank("[N, H, S, D]", **{name: tensor})
        check_floats(**{name: tensor})
    batch, heads, rows, width = query.shape
    check_features(heads, softcap, None, sinks, None, None)
    torch._check(key.shape[3] == width, lambda: f"query has head dim {width}, key {key.shape[3]}")
    check_heads(heads, key.shape[1], value.shape[1])
    return query.new_empty(batch, heads, rows, value.shape[3])


def fake_paged_attention(
    query: Tensor,
    key_cache: Tensor,
    value_cache: Tensor,
    block_tables: Tensor,
    seq_lens: Tensor,
    query_start: Tensor,
    scale: float,
    softcap: float | None = None,
    window: int | None = None,
    slopes: Tensor | None = None,
    sinks: Tensor | None = None,
    bias: Tensor | None = None,
    chunk: int | None = None,
    tree_mask: Tensor | None = None,
    key_format: str | None = None,
    value_format: str | None = None,
) -> Tensor:
    """Causal attention of one step over paged caches; see the module for steps, caches and features.

    A NaN or infinity of a token *of the sequence* can reach the other queries of that sequence, as it does in any
    softmax times matrix.

    With a tree mask, the tokens of this step are the nodes of a tree that grows from the sequence's earlier tokens: row
    ``t`` sees the j-th token of its sequence's step iff ``tree_mask[t, j]``. Its position is then ``seq_lens[n]`` minus
    the step's tokens of the sequence, plus the number of its set bits, minus 1; so do the keys of the step take the
    positions of their rows. A row's bits are its own and its ancestors', so that no key is newer than its query.

    Args:
        query: ``[T, Hq, D]``; Hq is a multiple of Hkv.
        key_cache: ``[B, Hkv, P, W]``, contiguous, of rows of D numbers.
        value_cache: ``[B, Hkv, P, Wv]``, contiguous, of rows of Dv numbers.
        block_tables: int64 ``[N, W]``.
        seq_lens: int64 ``[N]``.
        query_start: int64 ``[N + 1]``.
        scale: factor of ``q.k``.
        softcap: bound of the scores before slopes and bias.
        window: newest keys that a query sees, itself included.
        slopes: ALiBi slopes, float32 ``[Hq]``.
        sinks: ``[Hq]``, one more logit in the denominator, with no value.
        bias: ``[1 | Hq, L]`` by distance ``q - k`` or ``[1 | Hq, L, L]`` by (q, k); ``-inf`` hides a key.
        chunk: positions are cut into chunks of this many; keys of other chunks than the query's are hidden.
        tree_mask: bool ``[T, M]``, M at least the longest step of a sequence; columns past its step are ignored.
        key_format: name of the format of ``key_cache``.
        value_format: name of the format of ``value_cache``.

    Returns:
        ``[T, Hq, Dv]`` in the query's dtype; zeros where nothing is visible.

    Raises:
        InputError: if lengths, query starts, block tables, bias and tree mask do not fit each other (when run, not when
            traced), or caches and formats do not.
    """
    width = _check_paged(query, key_cache, value_cache, key_format, value_format)
    tokens, heads, _ = query.shape
    check_step(block_tables, seq_lens, query_start)
    check_features(heads, softcap, slopes, sinks, bias, chunk)
    check_tree(tree_mask, tokens)
    return query.new_empty(tokens, heads, width)


def fake_paged_attention_stats(
    query: Tensor,
    key_cache: Tensor,
    value_cache: Tensor,
    block_tables: Tensor,
    seq_lens: Tensor,
    query_start: Tensor,
    scale: float,
    softcap: float | None = None,
    window: int | None = None,
    slopes: Tensor | None = None,
    sinks: Tensor | None = None,
    bias: Tensor | None = None,
    chunk: int | None = None,
    tree_mask: Tensor | None = None,
    key_format: str | None = None,
    value_format: str | None = None,
    mass: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:
    """``paged_attention``, with the log-sum-exp of every row and, if asked for, the weight that every slot received.

    Args:
        query: this and all others but the last are those of ``paged_attention``.
        mass: whether to sum up the weights.

    Returns:
        the output ``[T, Hq, Dv]``; the log-sum-exp float32 ``[T, Hq]``, which is the log of the sum of ``exp(score)``
        over the visible keys and the sink, ``-inf`` where no key is visible; and the mass float32 ``[N, Hkv, W * P]``,
        the weights after the softmax of each slot of each block table, summed over the sequence's rows of this step and
        over the query heads of the group; ``[0]`` when not asked for. The sum of two partial results is
        ``sum(exp(lse_i - lse) * out_i)`` with ``lse = log(sum(exp(lse_i)))``.
    """
    width = _check_paged(query, key_cache, value_cache, key_format, value_format)
    tokens, heads, _ = query.shape
    check_step(block_tables, seq_lens, query_start)
    check_features(heads, softcap, slopes, sinks, bias, chunk)
    check_tree(tree_mask, tokens)
    slots = (len(block_tables), key_cache.shape[1], block_tables.shape[1] * key_cache.shape[2])
    return (
        query.new_empty(tokens, heads, width),
        query.new_empty(tokens, heads, dtype=torch.float32),
        query.new_empty(slots if mass else (0,), dtype=torch.float32),
    )


def fake_latent_attention(
    query: Tensor,
    cache: Tensor,
    block_tables: Tensor,
    seq_lens: Tensor,
    query_start: Tensor,
    scale: float,
    value_dim: int,
    softcap: float | None = None,
    window: int | None = None,
    slopes: Tensor | None = None,
    sinks: Tensor | None = None,
    bias: Tensor | None = None,
    chunk: int | None = None,
    format: str | None = None,
) -> Tensor:
    """Multi-head latent attention, absorbed: all heads read one row per token, whose first part is its value as well.

    As ``paged_attention`` over one cache of one head, with values that are the first ``value_dim`` numbers of the very
    same rows: the latent, which is followed by the part that carries the position (512 + 64 in the usual models, but
    any widths will do). https://arxiv.org/abs/2405.04434, section 2.1.

    Args:
        query: ``[T, Hq, D]``, mapped into the latent space already.
        cache: ``[B, 1, P, W]``, contiguous, of rows of D numbers.
        block_tables: int64 ``[N, W]``; this and the rest as in ``paged_attention``.
        seq_lens: int64 ``[N]``.
        query_start: int64 ``[N + 1]``.
        scale: factor of ``q.k``.
        value_dim: numbers of a row that are its value, 1 to D.
        softcap: bound of the scores before slopes and bias.
        window: newest keys that a query sees, itself included.
        slopes: float32 ``[Hq]``.
        sinks: ``[Hq]``.
        bias: ``[1 | Hq, L]`` or ``[1 | Hq, L, L]``.
        chunk: size of the chunks of positions.
        format: name of the format of ``cache``.

    Returns:
        ``[T, Hq, value_dim]`` in the query's dtype.
    """
    check_rank("[T, Hq, D]", query=query)
    check_floats(query=query)
    tokens, heads, width = query.shape
    form = find_form("cache", cache, format)
    stored = form.row_width(cache.shape[3])
    torch._check(form.settles is None, lambda: f"a latent cache has one row for both: {form.name} is for one part")
    torch._check(stored == width, lambda: f"query has head dim {width}, latent cache {stored}")
    torch._check(cache.shape[1] == 1, lambda: f"a latent cache has one head, not {cache.shape[1]}")
    torch._check(1 <= value_dim <= width, lambda: f"value_dim={value_dim} must lie in 1 .. {width}")
    check_step(block_tables, seq_lens, query_start)
    check_features(heads, softcap, slopes, sinks, bias, chunk)
    return query.new_empty(tokens, heads, value_dim)


def fake_cascade_attention(
    query: Tensor,
    key_cache: Tensor,
    value_cache: Tensor,
    block_tables: Tensor,
    seq_lens: Tensor,
    query_start: Tensor,
    shared_start: Tensor,
    shared_lens: Tensor,
    scale: float,
    softcap: float | None = None,
    window: int | None = None,
    slopes: Tensor | None = None,
    sinks: Tensor | None = None,
    bias: Tensor | None = None,
    chunk: int | None = None,
    key_format: str | None = None,
    value_format: str | None = None,
) -> Tensor:
    """``paged_attention`` of sequences that begin with the same blocks, which are read once for all of them.

    The result is that of ``paged_attention``. How much sharing there is may be left unsaid (``shared_lens`` of 0), but
    what is said must be true: a wrong table is not noticed.

    Args:
        query: this and the rest but the next two as in ``paged_attention``.
        shared_start: int64 ``[S + 1]``, from 0 to N: group g is made of sequences ``shared_start[g]`` to
            ``shared_start[g + 1] - 1``.
        shared_lens: int64 ``[S]``, tokens at their beginning for which the sequences of the group have the same block
            table entries: a multiple of P, and all of them earlier than this step.

    Returns:
        ``[T, Hq, Dv]`` in the query's dtype.
    """
    width = _check_paged(query, key_cache, value_cache, key_format, value_format)
    tokens, heads, _ = query.shape
    check_step(block_tables, seq_lens, query_start)
    check_features(heads, softcap, slopes, sinks, bias, chunk)
    check_rank("[S + 1]", shared_start=shared_start)
    check_rank("[S]", shared_lens=shared_lens)
    check_whole(shared_start=shared_start, shared_lens=shared_lens)
    torch._check(
        shared_start.shape[0] == shared_lens.shape[0] + 1,
        lambda: f"shared_start has {shared_start.shape[0]} entries for {shared_lens.shape[0]} groups: one more is due",
    )
    return query.new_empty(tokens, heads, width)


def _check_paged(
    query: Tensor, key_cache: Tensor, value_cache: Tensor, key_format: str | None, value_format: str | None
) -> int:
    """The value width Dv of a paged attention whose operands fit each other."""
    check_rank("[T, Hq, D]", query=query)
    check_floats(query=query)
    keys, values = find_pair(key_cache, value_cache, key_format, value_format)
    width, stored = query.shape[2], keys.row_width(key_cache.shape[3])
    torch._check(stored == width, lambda: f"query has head dim {width}, key cache {stored}")
    check_heads(query.shape[1], key_cache.shape[1], value_cache.shape[1])
    return values.row_width(value_cache.shape[3])
