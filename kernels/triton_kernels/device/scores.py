"""From products of queries and keys to scores, with every feature of the attention ops, and to outputs."""

from __future__ import annotations

import triton
import triton.language as tl

LOG2E = tl.constexpr(1.4426950408889634)


@triton.jit
def sum_query(q0, q1, q2, q3):
    """The sum of each row's elements over all four sets of int4, float32 ``[BLOCK_M]``."""
    total = tl.sum(q0.to(tl.float32), 1) + tl.sum(q1.to(tl.float32), 1)
    return total + tl.sum(q2.to(tl.float32), 1) + tl.sum(q3.to(tl.float32), 1)


@triton.jit
def finish_scores(
    products,
    seen,
    row_token,
    row_head,
    row_position,
    keys,
    step_start,
    past,
    key_scale,
    key_offset,
    row_total,
    softcap,
    window,
    chunk,
    slopes,
    bias,
    bias_rows,
    bias_length,
    tree_mask,
    tree_width,
    positions,
    PAIRS: tl.constexpr,
    CAUSAL: tl.constexpr,
    PLAIN: tl.constexpr,
):
    """Scores in units of log 2, ``[BLOCK_M, BLOCK_N]``, of scaled products; ``-inf`` where a key is not seen.

    PLAIN: nothing is added to the products, and their scale is in units of log 2 already.

    ``key_scale`` is the scale of each key's row, or None; so is its ``key_offset``, which counts times ``row_total``,
    the scaled sum of a query's elements. ``row_*`` describe the rows and ``keys`` the columns;
    ``past`` is the number of tokens before this step's, whose first row is ``step_start``.
    """
    if key_scale is not None:
        products = products * key_scale[None, :]
    if key_offset is not None:
        products = products + row_total[:, None] * key_offset[None, :]
    if softcap is not None:
        products = softcap * (2.0 / (1.0 + tl.exp(products * (-2.0 / softcap))) - 1.0)
    key_position = keys
    if tree_mask is not None:
        ours = (keys >= past) & (keys - past < tree_width)
        place = row_token.to(tl.int64)[:, None] * tree_width + (keys - past)[None, :]
        shown = tl.load(tree_mask + place, mask=seen & ours[None, :], other=0) != 0
        seen = seen & (shown | (keys < past)[None, :])
        drafted = tl.load(positions + step_start + keys - past, mask=ours & (tl.max(seen.to(tl.int32), 0) > 0), other=0)
        key_position = tl.where(keys < past, keys, drafted)
    elif CAUSAL:
        seen = seen & (keys[None, :] <= row_position[:, None])
    distance = row_position[:, None] - key_position[None, :]
    if window is not None:
        seen = seen & (distance < window)
    if chunk is not None:
        seen = seen & ((row_position // chunk)[:, None] == (key_position // chunk)[None, :])
    if slopes is not None:
        products = products - tl.load(slopes + row_head)[:, None].to(tl.float32) * distance.to(tl.float32)
    if bias is not None:
        # A table that is too short gives NaN, never the value of another position.
        if PAIRS:
            place = row_position.to(tl.int64)[:, None] * bias_length + key_position[None, :]
            covered = (row_position[:, None] < bias_length) & (key_position[None, :] < bias_length)
        else:
            place = tl.maximum(distance, 0).to(tl.int64)
            covered = distance < bias_length
        place += (row_head.to(tl.int64) * bias_rows)[:, None]
        covered = covered & (row_position >= 0)[:, None]
        products += tl.load(bias + place, mask=seen & covered, other=float("nan")).to(tl.float32)
    if not PLAIN:
        products = products * LOG2E
    return tl.where(seen, products, float("-inf"))


@triton.jit
def add_scores(scores, largest, total):
    """One more tile of an online softmax: its weights, what to multiply the sums so far by, largest score and total."""
    higher = tl.maximum(largest, tl.max(scores, 1))
    base = tl.where(higher == float("-inf"), 0.0, higher)
    weights = tl.exp2(scores - base[:, None])
    shrink = tl.exp2(largest - base)
    return weights, shrink, higher, total * shrink + tl.sum(weights, 1)


@triton.jit
def weigh_keys(scores, lse, places, valid):
    """Weights of keys, summed over the rows, whose log-sum-exp stand at ``places``; 0 for rows that see nothing."""
    row_lse = tl.load(lse + places, mask=valid, other=0.0)
    row_lse = tl.where(row_lse == float("-inf"), 0.0, row_lse) * LOG2E
    return tl.sum(tl.exp2(scores - row_lse[:, None]), 0)


@triton.jit
def close_rows(largest, total, sinks, row_head, valid):
    """What to multiply a row's sum by, and its log-sum-exp, both with the sink; 0 and ``-inf`` if it saw nothing."""
    blind = total == 0.0
    top = largest
    if sinks is not None:
        sink = tl.load(sinks + row_head, mask=valid, other=0.0).to(tl.float32) * LOG2E
        top = tl.maximum(largest, sink)
    else:
        sink = largest
    top = tl.where(blind, 0.0, top)
    shrink = tl.exp2(largest - top)
    total = total * shrink
    if sinks is not None:
        total += tl.exp2(sink - top)
    factor = tl.where(blind, 0.0, shrink / tl.where(blind, 1.0, total))
    lse = tl.where(blind, float("-inf"), (top + tl.log2(tl.where(blind, 1.0, total))) / LOG2E)
    return factor, lse
