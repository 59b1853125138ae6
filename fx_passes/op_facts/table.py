"""The facts of every op that a pass knows.

A newcomer who asks what kvpass takes for granted of ``aten.layer_norm`` finds it here. A new op is a row, an axis rule
where none of those there fits, and a case in ``tests/fx_passes/op_cases.py`` that holds the row against what the op
does.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import torch
from torch._ops import OpOverloadPacket

from kvpass.fx_passes.op_facts.declared import DECLARED
from kvpass.fx_passes.op_facts.facts import OpFacts, OpKind, packet_of

aten = torch.ops.aten


def _named(names: str) -> Iterator[OpOverloadPacket]:
    """Ops of ATen, those that this PyTorch has."""
    return (getattr(aten, name) for name in names.split() if hasattr(aten, name))


POINTWISE = OpFacts(OpKind.POINTWISE, "pointwise")
MOVE = OpFacts(OpKind.MOVE, tokens=("self",), numbered=True, view=True, analytic=True, arranges=True)
CREATION = OpFacts(OpKind.CREATION, "filled", tokens=())
LIKE = OpFacts(OpKind.CREATION, "filled", tokens=("self",), fresh=True)
RANDOM = OpFacts(OpKind.CREATION, tokens=(), random=True)
REDUCTION = OpFacts(OpKind.REDUCTION, "reduction", tokens=("self", "other"))
ALONG = OpFacts(OpKind.ALONG, "along_dim", tokens=("self",))
NORM = OpFacts(OpKind.NORMALISATION, tokens=("input",))
PRODUCT = OpFacts(OpKind.CONTRACTION, "product")
CONVOLUTION = OpFacts(OpKind.CONVOLUTION, "convolution", tokens=("input",))

FACTS: dict[OpOverloadPacket, OpFacts] = {
    # elementwise
    **dict.fromkeys(
        _named(
            "__and__ __lshift__ __or__ __rshift__ __xor__ _conj_physical abs acos acosh addcdiv angle asin asinh atan "
            "atan2 atanh bitwise_and bitwise_left_shift bitwise_not bitwise_or bitwise_right_shift bitwise_xor ceil "
            "celu clamp clamp_max clamp_min clip complex conj_physical copy copysign cos cosh deg2rad digamma elu eq "
            "erf erfc erfinv exp exp2 expm1 fill float_power floor floor_divide fmax fmin fmod frac gcd ge gelu gt "
            "hardshrink hardsigmoid hardswish hardtanh heaviside hypot i0 igamma igammac imag isfinite isinf isnan "
            "isneginf isposinf lcm ldexp le leaky_relu lerp lgamma log log10 log1p log2 logaddexp logaddexp2 "
            "logical_and logical_not logical_or logical_xor logit lt maximum minimum mish mvlgamma nan_to_num ne "
            "nextafter polar polygamma positive rad2deg real relu relu6 remainder round rsub selu sgn sigmoid sign "
            "signbit silu sin sinc sinh softplus softshrink special_airy_ai special_bessel_j0 special_bessel_j1 "
            "special_bessel_y0 special_bessel_y1 special_entr special_erfcx special_i0e special_i1 special_i1e "
            "special_log_ndtr special_modified_bessel_i0 special_modified_bessel_i1 special_modified_bessel_k0 "
            "special_modified_bessel_k1 special_ndtri special_xlog1py special_zeta tan tanh threshold trunc xlogy"
        ),
        POINTWISE,
    ),
    **dict.fromkeys(
        _named("add addcmul div mul neg pow reciprocal rsqrt sqrt square sub true_divide"),
        replace(POINTWISE, analytic=True),
    ),
    aten.masked_fill: replace(POINTWISE, arranges=True),
    aten.where: replace(POINTWISE, axes="where", arranges=True),
    aten.prelu: OpFacts(OpKind.PARAMETRIC, "first_operand", tokens=("self",)),
    aten.bucketize: OpFacts(OpKind.PARAMETRIC, "first_operand", tokens=("self", "input")),
    aten.log_sigmoid_forward: OpFacts(OpKind.PARAMETRIC, "log_sigmoid", tokens=("self",)),
    # casts and copies
    aten._to_copy: replace(POINTWISE, analytic=True, spreads=True, arranges=True),
    aten.to: replace(POINTWISE, spreads=True),
    aten.clone: replace(POINTWISE, analytic=True, spreads=True),
    **dict.fromkeys(
        _named("alias detach lift_fresh lift_fresh_copy detach_"), OpFacts(OpKind.MOVE, view=True, spreads=True)
    ),
    # moves
    **dict.fromkeys(_named("reshape view"), replace(MOVE, axes="reshape", spreads=True)),
    aten._unsafe_view: replace(MOVE, axes="reshape", analytic=False),
    **dict.fromkeys(_named("flatten unflatten"), replace(MOVE, axes="reshape", numbered=False, view=False)),
    aten.permute: replace(MOVE, axes="permute", spreads=True),
    aten.transpose: replace(MOVE, axes="transpose", spreads=True),
    aten.t: replace(MOVE, analytic=False),
    aten.unsqueeze: replace(MOVE, axes="unsqueeze", spreads=True),
    aten.squeeze: replace(MOVE, axes="squeeze", spreads=True),
    aten.expand: replace(MOVE, axes="expand", spreads=True),
    aten.repeat: replace(MOVE, axes="repeat", view=False, analytic=False),
    aten.repeat_interleave: replace(MOVE, axes="repeat_interleave", view=False, analytic=False, arranges=False),
    aten.cat: replace(MOVE, axes="cat", tokens=("tensors",), view=False),
    aten.stack: replace(MOVE, axes="stack", tokens=("tensors",), view=False),
    **dict.fromkeys(_named("slice narrow"), replace(MOVE, axes="narrow", arranges=False)),
    aten.unfold: OpFacts(OpKind.MOVE, "narrow", tokens=("self",)),
    aten.select: replace(MOVE, axes="select", arranges=False),
    **dict.fromkeys(_named("split split_with_sizes chunk unbind"), replace(MOVE, axes="split", arranges=False)),
    aten.tensor_split: OpFacts(OpKind.MOVE, "split", tokens=("self",)),
    **dict.fromkeys(
        _named("slice_scatter select_scatter"),
        OpFacts(OpKind.MOVE, "slice_scatter", tokens=("self", "src"), numbered=True),
    ),
    aten.flip: replace(MOVE, axes="along_dim", view=False, arranges=False),
    aten.roll: OpFacts(OpKind.MOVE, "along_dim", tokens=("self",), analytic=True),
    **dict.fromkeys(_named("constant_pad_nd pad"), OpFacts(OpKind.MOVE, "pad", tokens=("self",))),
    aten.view_as_complex: OpFacts(OpKind.MOVE, "as_complex", tokens=("self",), analytic=True),
    aten.view_as_real: OpFacts(OpKind.MOVE, "as_real", tokens=("self",), analytic=True),
    aten.view_as_real_copy: OpFacts(OpKind.MOVE, "as_real", tokens=("self",)),
    # sums of products
    **dict.fromkeys(_named("linear matmul mm bmm addmm baddbmm mv"), PRODUCT),
    aten.outer: OpFacts(OpKind.CONTRACTION, "outer"),
    aten._grouped_mm: OpFacts(OpKind.ROUTING, "grouped_product", tokens=("self", "offs")),
    # reductions, and ops along a dim
    **dict.fromkeys(_named("sum mean"), replace(REDUCTION, analytic=True)),
    **dict.fromkeys(
        _named(
            "amax amin max min argmax argmin var std var_mean std_mean norm linalg_vector_norm logsumexp prod any all "
            "nansum median count_nonzero kthvalue mode"
        ),
        REDUCTION,
    ),
    aten.cumsum: replace(ALONG, arranges=True),
    **dict.fromkeys(
        _named(
            "softmax _softmax log_softmax _log_softmax _safe_softmax cumprod cummax cummin logcumsumexp sort argsort "
            "topk glu fft_fft fft_ifft fft_rfft fft_irfft"
        ),
        ALONG,
    ),
    **dict.fromkeys(_named("avg_pool1d max_pool1d adaptive_avg_pool1d"), replace(ALONG, axes="pool")),
    aten.one_hot: replace(ALONG, axes="one_hot"),
    # norms: weights, biases and running statistics are no tokens
    **dict.fromkeys(
        _named("layer_norm native_layer_norm rms_norm _fused_rms_norm"), replace(NORM, axes="normalise_last")
    ),
    aten.group_norm: replace(NORM, axes="group_norm"),
    **dict.fromkeys(_named("batch_norm _native_batch_norm_legit_no_training"), replace(NORM, axes="batch_norm")),
    **dict.fromkeys(_named("convolution conv1d conv2d"), CONVOLUTION),
    # lookups and writes by index
    aten.embedding: OpFacts(OpKind.LOOKUP, "embedding", tokens=("indices",)),
    aten.index_select: OpFacts(OpKind.LOOKUP, "index_select", tokens=("self", "index"), numbered=True),
    aten.index: OpFacts(OpKind.LOOKUP, "index", tokens=("self", "indices"), numbered=True),
    aten.gather: OpFacts(OpKind.LOOKUP, "gather", tokens=("self", "index"), numbered=True),
    **dict.fromkeys(
        _named("scatter scatter_add scatter_reduce"),
        OpFacts(OpKind.SCATTER, "scatter", tokens=("self", "index", "src")),
    ),
    **dict.fromkeys(_named("nonzero nonzero_numpy"), OpFacts(OpKind.ROUTING, "nonzero", tokens=("self",))),
    aten.index_put: OpFacts(OpKind.ROUTING, "index_put", tokens=("self", "indices", "values")),
    aten.index_add: OpFacts(OpKind.ROUTING, "index_add", tokens=("self", "index", "source")),
    **dict.fromkeys(_named("histc bincount"), OpFacts(OpKind.ROUTING, "counted", tokens=("self",))),
    # what is made of sizes and numbers
    **dict.fromkeys(_named("zeros ones full"), replace(CREATION, spreads=True, arranges=True)),
    aten.scalar_tensor: replace(CREATION, spreads=True),
    aten.empty: CREATION,
    aten.arange: OpFacts(OpKind.CREATION, tokens=()),
    **dict.fromkeys(_named("new_ones new_zeros new_full full_like"), replace(LIKE, arranges=True)),
    **dict.fromkeys(_named("new_empty new_empty_strided zeros_like ones_like empty_like"), LIKE),
    **dict.fromkeys(
        _named("sym_size sym_numel sym_stride"), OpFacts(OpKind.SIZE, fresh=True, view=True, arranges=True)
    ),
    **dict.fromkeys(_named("rand_like randn_like bernoulli rand randn randint randperm"), RANDOM),
    # attention
    aten.scaled_dot_product_attention: OpFacts(
        OpKind.ATTENTION, "attention", tokens=("query", "key", "value", "attn_mask")
    ),
    # made by find-attention, which reads what bias and sinks are
    torch.ops.kvpass.dense_attention: OpFacts(
        OpKind.ATTENTION, "attention", tokens=("query", "key", "value", "bias", "sinks")
    ),
    **dict.fromkeys(
        _named("_assert_tensor_metadata _assert_scalar _assert_async sym_constrain_range sym_constrain_range_for_size"),
        OpFacts(OpKind.ASSERTION),
    ),
}


def facts_of(target: object) -> OpFacts | None:
    """The facts of what a node calls: those of the table, or those that were declared; None where there are none."""
    packet = packet_of(target)
    if packet is None:
        return None
    return FACTS.get(packet) or DECLARED.get(packet)


def ops_that(fact: str) -> tuple[OpOverloadPacket, ...]:
    """The ops of the table for which a fact, such as ``"view"``, holds."""
    return tuple(packet for packet, facts in FACTS.items() if getattr(facts, fact))
