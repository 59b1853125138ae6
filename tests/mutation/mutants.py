"""Faults for the passes, one at a time, and a decoder on which each must show.

A mutant is an edit of one function's source text. What catches it is the refusal of a pass, the verification, or the
comparison of tokens with the naive loop: `judge` says which.
"""

from __future__ import annotations

import copy
import importlib
import inspect
import textwrap
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import kvpass
from tests.decoders.catalogue import DECODERS, UNUSUAL
from tests.decoders.refused import REFUSED
from tests.decoders.skeleton import VOCAB
from tests.parity.harness import CONFIG, SEED, assert_tokens_equal, ragged_prompts


@dataclass(frozen=True)
class Mutant:
    """One fault.

    Attributes:
        where: `module:function` or `module:Class.method` in kvpass.fx_passes.
        old: text that occurs once in the function.
        new: what takes its place.
        probe: the decoder on which it must show; one that must be refused where the fault weakens a proof.
        dtype: format of the caches; tokens are compared only where it is exact.
    """

    where: str
    old: str
    new: str
    probe: str
    dtype: str = "auto"


MUTANTS: dict[str, Mutant] = {
    # scores
    "scale dropped": Mutant(
        "attention.read_scores:_scale", "scale=scores.scale * number", "scale=scores.scale", "einsum, tril of ones"
    ),
    "default scale of SDPA upside down": Mutant(
        "attention.rewrite_sdpa:rewrite_sdpa", "** -0.5", "** 0.5", "GQA by repeat_interleave"
    ),
    "softcap dropped": Mutant(
        "attention.rewrite_softmax:_attend", "scores.cap, sinks)", "None, sinks)", "softcap and q/k norms"
    ),
    "sinks skipped": Mutant(
        "attention.rewrite_softmax:_attend", "scores.cap, sinks)", "scores.cap, None)", "sink column"
    ),
    "mask upside down": Mutant("attention.read_scores:_masked_fill", "logical_not", "clone", "masked_fill of -1e9"),
    "mask forgotten": Mutant(
        "attention.read_scores:_masked_fill",
        "return _hide(",
        "return reader.read(named['self']) or _hide(",
        "masked_fill of -1e9",
    ),
    "alpha of baddbmm dropped": Mutant(
        "token_axis.contraction:contraction_of", 'alpha=float(named["alpha"])', "alpha=1.0", "baddbmm on merged heads"
    ),
    "second softmax added": Mutant(
        "attention.softmax_terms:_sum", "sign = -1.0 if", "sign = 1.0 if", "softmaxes subtracted before the values"
    ),
    "weights of a mask forgotten": Mutant(
        "canonical.softmax_rules:_logits", "in weights.gates", "in ()", "masked after the softmax"
    ),
    "shift of the sum forgotten": Mutant(
        "canonical.softmax_rules:_with_extra",
        "sink, logits = (sink.args[0], logits.args[0]) if same",
        "sink, logits = (sink.args[0], logits) if same",
        "sink in the sum",
    ),
    "factors of the scores forgotten": Mutant(
        "attention.rewrite_softmax:_queries_and_keys", "in scores.factors:", "in ():", "temperature per head"
    ),
    "dims not permuted": Mutant(
        "attention.layouts:arrange",
        "if order != list(range(len(order))):",
        "if False:",
        "time first, bmm on merged heads",
    ),
    "heads not spread back": Mutant(
        "attention.layouts:spread",
        "if order != list(range(len(order))):",
        "if False:",
        "channels first, 1x1 convolutions",
    ),
    # masks
    "window one too narrow": Mutant(
        "lowering.insert_cache:_attend",
        "mask.window,",
        "mask.window and mask.window - 1,",
        "band of triu and tril, rotary",
    ),
    "window one too wide": Mutant(
        "lowering.insert_cache:_attend",
        "mask.window,",
        "mask.window and mask.window + 1,",
        "band of triu and tril, rotary",
    ),
    "window forgotten": Mutant(
        "lowering.insert_cache:_attend", "mask.window,", "None,", "window by distance, float mask"
    ),
    "slopes forgotten": Mutant(
        "lowering.insert_cache:_attend", "_table(captured, slopes,", "_table(captured, None,", "ALiBi from aranges"
    ),
    "bias forgotten": Mutant(
        "lowering.insert_cache:_attend",
        "_table(captured, bias,",
        "_table(captured, None,",
        "learned bias for each pair of positions",
    ),
    # heads and caches
    "heads not put back in order": Mutant(
        "lowering.insert_cache:_attend",
        "inverse = hold(",
        "return result\n        inverse = hold(",
        "GQA by tiling, head h % Hkv",
    ),
    "query heads read the wrong group": Mutant(
        "planning.choose_storage:_distinct_heads",
        "reads = [first.index(pairs[h // repeat])",
        "reads = [first.index(pairs[h % len(pairs)])",
        "GQA by enable_gqa",
    ),
    "layers share one cache": Mutant(
        "planning.choose_storage:StoredHeads.same", "self.content == other.content", "True", "GQA by repeat_interleave"
    ),
    "weights of the next head": Mutant(
        "planning.absorb:_Builder.weights",
        "places = constants.places[: self.count(constants)]",
        "places = constants.places[: self.count(constants)].roll(1, 0)",
        "latent keys and values",
    ),
    "a factor of keys dropped": Mutant(
        "planning.absorb:_Builder.scale",
        "return self.by_head(",
        "return node or self.by_head(",
        "keys and values of two latents",
    ),
    "a bias of values dropped": Mutant(
        "planning.absorb:_Builder.forward",
        "return self.by_head(",
        "return source or self.by_head(",
        "keys and values of two latents",
    ),
    "keys stored as values": Mutant(
        "lowering.insert_cache:_write", "stored.value_places", "stored.key_places", "GQA by repeat_interleave"
    ),
    "stored numbers in reverse": Mutant(
        "lowering.insert_cache:_rows",
        "wanted = places.flatten()",
        "wanted = places.flatten().flip(0)",
        "GQA by repeat_interleave",
    ),
    "parts of the cut on top of each other": Mutant(
        "planning.minimum_cut:_trace", "node, offset, total) for", "node, 0, total) for", "GQA by repeat_interleave"
    ),
    # positions and rows
    "positions shifted": Mutant(
        "token_axis.find_positions:Lookup.rebuild",
        "positions, self.start",
        "positions, self.start - 1",
        "position table with an offset",
    ),
    "rows of another token": Mutant(
        "lowering.select_logits:SelectLogits.apply",
        'step.step["logits_index"]',
        'step.step["positions"]',
        "GPT-2 with a tril buffer slice",
    ),
    "rows selected before the attention": Mutant(
        "lowering.select_logits:_narrow_waist",
        "if place[node] <= last or",
        "if place[node] <= 9 or",
        "GPT-2 with a tril buffer slice",
    ),
    # proofs
    "dropout taken out when it is on": Mutant(
        "canonical.canonicalize:_dropout", "return named", "off = True\n    return named", "dropout left on"
    ),
    "ops along the tokens allowed": Mutant(
        "token_axis.infer_axes:along", 'raise MixesTokens(f"works along {what}")', "pass", "cumulative mean"
    ),
    "ops without a rule allowed": Mutant(
        "token_axis.infer_axes:_axes_of",
        'raise MixesTokens("is an op for which kvpass',
        'rule = rules["pointwise"] or ("',
        "Fourier over time",
    ),
    "proof switched off": Mutant(
        "token_axis.prove_token_axis:ProveTokenAxis.apply",
        "return PassResult(0, (refuse(captured, axes.node",
        "return PassResult(0, ()) or (0, (refuse(captured, axes.node",
        "token shift",
    ),
    "slices of the sequence allowed": Mutant(
        "token_axis.moving_rules:narrow",
        'raise MixesTokens(_of(axes[d], "takes a part of"))',
        "pass",
        "every second key",
    ),
    "tokens times tokens allowed": Mutant(
        "token_axis.contraction:contract",
        'raise MixesTokens("sums over the tokens of the sequence")',
        "pass",
        "causal matrix over time",
    ),
    # the step's clean-up
    "merged projections exchanged": Mutant(
        "optimization.merge_projections:_merge",
        "(parts, place)",
        "(parts, (0, 2, 1)[place])",
        "GQA by repeat_interleave",
    ),
    "pairs of the fused rotation exchanged": Mutant(
        "optimization.fuse_writes:_Fusion.fuse",
        "sin, of_key[1].interleaved",
        "sin, not of_key[1].interleaved",
        "rotary by YaRN",
    ),
    "fused norm without its epsilon": Mutant(
        "optimization.fuse_writes:_Fusion.fuse", "max(eps, default=0.0)", "1.0", "softcap and q/k norms"
    ),
    # rotations around caches
    "bias of rotated values left as it was": Mutant(
        "optimization.fold_rotations:_replace",
        "if derived.bias is None else hold(",
        "if True else hold(",
        "GPT-2 with a tril buffer slice",
        "int4",
    ),
    "rotated weights of one layer for all": Mutant(
        "optimization.fold_rotations:_key", "projection.weight.target,", "None,", "GQA by repeat_interleave", "int4"
    ),
}


@dataclass(frozen=True)
class Caught:
    """What caught a mutant: "refusal", "verification", "tokens" or "crash"; "nothing" if it survived."""

    by: str
    detail: str = ""


def probe_of(mutant: Mutant) -> Callable[[int], Any]:
    """Builds the mutant's decoder."""
    if mutant.probe in REFUSED:
        return REFUSED[mutant.probe].build
    return {**DECODERS, **UNUSUAL}[mutant.probe]


def _function(where: str) -> Any:
    module, _, path = where.partition(":")
    found: Any = importlib.import_module(f"kvpass.fx_passes.{module}")
    for name in path.split("."):
        found = getattr(found, name)
    return found


def mutated_source(mutant: Mutant) -> str:
    """Source of the mutated function.

    Raises:
        ValueError: if the text to replace does not occur exactly once.
    """
    source = textwrap.dedent(inspect.getsource(_function(mutant.where)))
    if source.count(mutant.old) != 1:
        raise ValueError(f"{mutant.old!r} occurs {source.count(mutant.old)} times in {mutant.where}")
    return source.replace(mutant.old, mutant.new)


@contextmanager
def planted(mutant: Mutant) -> Iterator[None]:
    """The fault in place: the function's code is exchanged, so that everybody who imported it has it."""
    function = _function(mutant.where)
    namespace: dict[str, Any] = {}
    exec(compile(mutated_source(mutant), f"<mutant of {mutant.where}>", "exec"), function.__globals__, namespace)
    before = function.__code__
    function.__code__ = namespace[function.__name__].__code__
    try:
        yield
    finally:
        function.__code__ = before


def judge(mutant: Mutant) -> Caught:
    """Plant the fault, compile its decoder and compare tokens; says what caught the fault."""
    model = probe_of(mutant)(SEED)
    with planted(mutant):
        try:
            engine = kvpass.compile(copy.deepcopy(model), replace(CONFIG, dtype=mutant.dtype))
        except kvpass.VerificationError as error:
            return Caught("verification", next(line for line in str(error).splitlines() if "FAILED" in line))
        except kvpass.RefusedError as error:
            first = error.report.refusals[0]
            return Caught("refusal", f"{first.pass_name}: {first.reason}"[:160])
        except Exception as error:
            return Caught("crash", f"{type(error).__name__}: {error}"[:160])
        if mutant.dtype != "auto":
            return Caught("nothing")
        try:
            assert_tokens_equal(model, engine, ragged_prompts(VOCAB, lengths=(3, 44)), 8)
        except AssertionError as error:
            return Caught("tokens", str(error).splitlines()[0])
    return Caught("nothing")
