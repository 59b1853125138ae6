"""The frozen dataclasses in which the rooms meet, and the one alphabet of shapes.

Shape alphabet, used in every docstring of the project:

====  =====================================================
T     tokens of one step, flattened over sequences
G     groups of caches, each with block tables of its own
N     sequences of one step
R     rows of logits asked for in one step
B     blocks of the pool
P     tokens per block (``block_size``)
Hq    query heads
Hkv   key/value heads as stored in the cache
D     head dim of queries and keys
Dv    head dim of values
L     longest length that a table covers
V     vocabulary size
====  =====================================================
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor


@dataclass(frozen=True)
class Refusal:
    """Why a graph, or one node of it, could not be proven.

    Attributes:
        reason: what was found and why it cannot be rewritten, in one sentence.
        node: name of the graph node, with its op.
        module_path: dotted path of the module whose forward made the node; empty for the root.
        pass_name: kebab-case name of the pass that refused.
        source: file and line of the user's code, where the capture recorded it.
    """

    reason: str
    node: str = ""
    module_path: str = ""
    pass_name: str = ""
    source: str = ""

    def __str__(self) -> str:
        where = ", ".join(part for part in (self.module_path and f"module {self.module_path}", self.source) if part)
        node = f" at node {self.node}" if self.node else ""
        return f"{self.reason}{node}{f' ({where})' if where else ''}"


@dataclass(frozen=True, eq=False)
class MaskMeaning:
    """What a mask or bias means, read from its values.

    A key at position k is visible to a query at position q when ``k <= q``, when ``q - k < window`` (if there is a
    window), when ``k // chunk == q // chunk`` (if there are chunks), and when the bias is not ``-inf`` (if there is
    one); or when ``k < prefix``, whatever the query (if there is a prefix). Scores are
    ``softcap(scale * q.k) - slope[h] * (q - k) + bias[h, ...]``.

    Attributes:
        window: number of newest keys a query sees, itself included; None means all.
        chunk: tokens per chunk, where a query sees the keys of its own chunk alone; None means no chunks.
        slopes: ALiBi slope of each query head, float32 ``[Hq]``.
        bias: residual bias, float32: ``[1 | Hq, L]`` indexed by distance ``q - k``, or ``[1 | Hq, L, L]`` indexed by
            (q, k). ``-inf`` hides a key.
        prefix: first tokens, which see one another (prefix-LM); None means that no token sees a later one. It goes
            with none of the others.
        limit: longest sequence for which the meaning holds; None means every length.
        evidence: how it was established, for the report.
    """

    window: int | None = None
    chunk: int | None = None
    slopes: Tensor | None = None
    bias: Tensor | None = None
    prefix: int | None = None
    limit: int | None = None
    evidence: str = ""

    @property
    def reach(self) -> int | None:
        """Newest keys, the query's own included, among which are all that it sees; None means all of them."""
        return min((size for size in (self.window, self.chunk) if size is not None), default=None)

    def describe(self) -> str:
        """A short name for the report, such as ``causal``, ``sliding window 4096`` or ``causal + ALiBi``."""
        parts = [] if self.window is None else [f"sliding window {self.window}"]
        if self.chunk is not None:
            parts.append(f"chunks of {self.chunk}")
        parts = parts or ["causal" if self.prefix is None else f"causal behind a prefix of {self.prefix}"]
        if self.slopes is not None:
            parts.append("ALiBi")
        if self.bias is not None:
            parts.append("bias by distance" if self.bias.dim() == 2 else "bias table")
        text = " + ".join(parts)
        return text if self.limit is None else f"{text}, up to {self.limit} tokens"


@dataclass(frozen=True)
class CacheSpec:
    """One paged cache: what is remembered of a past token for one or more attention sites.

    The cache is two tensors, keys ``[B, num_kv_heads, P, key_dim]`` and values ``[B, num_kv_heads, P, value_dim]``,
    each in its format of :data:`kvpass.kernels.formats.cache_formats.FORMATS`.

    Attributes:
        name: unique within the plan, for example ``layers.3.attn``.
        num_kv_heads: heads that are stored, Hkv.
        key_dim: width D of a stored key head.
        value_dim: width Dv of a stored value head; 0 where values are entries of the key rows, as in latent attention.
        key_format: format name of keys.
        value_format: format name of values.
        window: newest tokens, the query's own included, that any of the sites that read it may look at (the largest
            window or chunk); None when one of them sees everything.
        sites: names of the attention sites that read it.
        group: whose block tables say where tokens are; caches of one group give back their blocks together.
    """

    name: str
    num_kv_heads: int
    key_dim: int
    value_dim: int
    key_format: str
    value_format: str
    window: int | None = None
    sites: tuple[str, ...] = ()
    group: int = 0


@dataclass(frozen=True)
class StateSpec:
    """One recurrent state: what a layer remembers of all past tokens of a sequence together, whatever their number.

    Attributes:
        name: unique within the plan.
        shape: of the state of one sequence.
        dtype: of its numbers.
    """

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype


@dataclass(frozen=True)
class CachePlan:
    """What the passes ask of the runtime; the two rooms meet here and nowhere else.

    Attributes:
        caches: one spec per cache; the order is that of the ``caches`` argument of ``PagedModule.forward``.
        block_size: tokens per block, P; a power of two.
        max_length: longest sequence for which the rewritten graph is proven equal; None means every length.
        max_length_reason: where ``max_length`` comes from, for error messages.
        vocab_size: number of token ids that the model accepts.
        forbidden_tokens: ids that no sequence may contain; the rewrite is proven for sequences without them. One is
            the padding token of a model that counts positions without padding.
        prefix: first tokens of each sequence, which see one another and have to be computed in one step; 0 where no
            token sees a later one.
        states: recurrent states of a module of your own; the order is that of :attr:`StepInputs.states`.
    """

    caches: tuple[CacheSpec, ...]
    block_size: int
    vocab_size: int
    max_length: int | None = None
    max_length_reason: str = ""
    forbidden_tokens: tuple[int, ...] = ()
    prefix: int = 0
    states: tuple[StateSpec, ...] = ()

    @property
    def settles(self) -> bool:
        """Whether a cache is in k4v2, whose blocks have other numbers than those of other caches."""
        return any(spec.key_format == "k4" for spec in self.caches)

    @property
    def group_windows(self) -> tuple[int | None, ...]:
        """For each group the newest tokens, the query's own included, that are looked at in any of its caches.

        None where one of them sees everything. There is at least one group.
        """
        groups: list[list[int | None]] = [[] for _ in range(1 + max((spec.group for spec in self.caches), default=0))]
        for spec in self.caches:
            groups[spec.group].append(spec.window)
        return tuple(None if None in found else max((w for w in found if w), default=None) for found in groups)


@dataclass(frozen=True)
class AttentionSinks:
    """Forgets the middle of long sequences, which bounds their cache and is lossy (StreamingLLM, arXiv 2309.17453).

    Kept are the first tokens, which attention needs as sinks, and the newest ones; whole blocks between them are given
    back. What a token sees changes where its position is a multiple of ``every``, and so depends on nothing but its
    position: from there the first ``sinks`` tokens and those no more than ``window`` before, each rounded up to blocks.

    Unlike the paper's, positions are not counted anew in what is left: keys are cached with their own positions, and
    keep them, so distances to the sinks grow with the sequence.

    Attributes:
        window: newest tokens that are kept.
        sinks: first tokens that are kept.
        every: tokens from one time of forgetting to the next, which is also the longest chunk of a prompt; a quarter of
            the window when None.
    """

    window: int
    sinks: int = 4
    every: int | None = None

    @property
    def stride(self) -> int:
        """``every``, or what it is when None."""
        return max(1, self.window // 4) if self.every is None else self.every

    def kept_blocks(self, block_size: int) -> int:
        """Blocks at the front that are never given back."""
        return -(-self.sinks // block_size)

    def count_passed(self, computed: int, block_size: int) -> int:
        """Blocks from the front, those of the sinks among them, before what a token at position ``computed`` sees."""
        passed = max(0, computed - computed % self.stride - self.window) // block_size
        return passed if passed > self.kept_blocks(block_size) else 0

    def next_change(self, computed: int) -> int:
        """The first position after ``computed`` where what is seen may change."""
        return computed - computed % self.stride + self.stride


@dataclass(frozen=True)
class HeavyHitters:
    """Forgets what has received little attention, which bounds the cache and is lossy (H2O, arXiv 2306.14048).

    As :class:`AttentionSinks` with a window of ``recent`` tokens; but of the blocks between sinks and window those stay
    that have received the most attention, as many as ``heavy`` tokens need. The attention of a block is the sum of the
    weights that its tokens got from all later ones and from each other, over query heads and layers, since the layers
    share one block table. What was given back does not come back.

    Attributes:
        recent: newest tokens that are kept.
        heavy: tokens that are kept besides.
        sinks: first tokens that are kept.
        every: tokens from one time of forgetting to the next, which is also the longest chunk of a prompt; a quarter of
            ``recent`` when None.
    """

    recent: int
    heavy: int
    sinks: int = 4
    every: int | None = None

    @property
    def ends(self) -> AttentionSinks:
        """What is kept whatever attention it has received."""
        return AttentionSinks(self.recent, self.sinks, self.every)

    def heavy_blocks(self, block_size: int) -> int:
        """Blocks that are kept besides."""
        return -(-self.heavy // block_size)


@dataclass(frozen=True, eq=False)
class StepInputs:
    """One step of a paged module: T tokens of N sequences, prefill and decode in any mix.

    The tokens of a sequence are contiguous and in order. All tensors are on the module's device, and int64 unless
    it is said otherwise.

    Attributes:
        token_ids: ``[T]``.
        positions: ``[T]``, position of each token in its sequence, from 0.
        slot_mapping: ``[G, T]``, where the token's keys and values are written in the caches of each group:
            ``block * P + offset``. Where caches are in k4v2 ``[2 G, T]``: the second half for those, in the numbers of
            :mod:`kvpass.kernels.formats.settling`.
        block_tables: ``[G, N, W]``, blocks of each sequence in order, in each group (or ``[2 G, N, W]``, as above);
            entries past the sequence's end, and those that no query sees through the windows of the group, are ignored.
        seq_lens: ``[N]``, tokens of each sequence once this step is written, those of earlier steps included.
        query_start: ``[N + 1]``, first row of each sequence's tokens in ``token_ids``; the last entry is T.
        logits_index: ``[R]``, rows of ``token_ids`` whose logits are wanted.
        tree_mask: bool ``[T, M]``, M the most tokens that a sequence has in the step: which of them each token sees,
            where the tokens of a sequence are nodes of a tree that grows from its earlier ones. A row's bits are its
            own and its ancestors', and its position is that of its depth; its slot is still that of its place among
            the tokens. None where each token sees all before it.
        state_slots: ``[N]``, the slot of each sequence in ``states``, no two equal; None where the plan has no states.
        states: ``[slots, *shape]`` for each of ``plan.states``, to be changed in place at ``state_slots``: what is
            there is the state after the earlier tokens of the sequence (zeros if there are none), and has to be the
            state after those of this step when the module returns.
    """

    token_ids: Tensor
    positions: Tensor
    slot_mapping: Tensor
    block_tables: Tensor
    seq_lens: Tensor
    query_start: Tensor
    logits_index: Tensor
    tree_mask: Tensor | None = None
    state_slots: Tensor | None = None
    states: tuple[Tensor, ...] = ()


FinishReason = Literal["length", "stop", "error", "deadline"]


# The tokens generated so far -> the ids that may come next, or a mask, bool ``[V]`` (a tensor or a numpy array).
AllowedTokens = Callable[[list[int]], Iterable[int] | Any]


class TokenLogprobs(NamedTuple):
    """How likely a chosen token was, and which tokens were likeliest, before any option of the sampling.

    Attributes:
        token: the chosen token.
        logprob: natural logarithm of its probability in the model's own distribution, the softmax of its raw logits.
        top: the likeliest tokens with theirs, the likeliest first; the chosen one is among them only if it is one.
    """

    token: int
    logprob: float
    top: tuple[tuple[int, float], ...]


@dataclass(frozen=True)
class Sampling:
    """How the next token is chosen, and when to stop.

    In this order: the penalties change the logits, ``logit_bias`` is added, ``allowed_tokens`` rules tokens out; the
    most likely of what is left is taken, or with a ``temperature`` one is drawn from what ``top_k``, then ``top_p``,
    then ``min_p`` leave.

    Attributes:
        temperature: 0 picks the most likely token (greedy).
        top_p: keep the smallest set of tokens whose probability reaches this (nucleus sampling), in (0, 1].
        top_k: keep this many tokens; 0 or -1 keeps all.
        min_p: keep tokens at least this fraction as likely as the most likely one, in [0, 1].
        seed: makes the choice reproducible, whatever else is in the batch; None draws a fresh seed.
        stop_token_ids: generation ends after one of these; it is the last token returned.
        ignore_eos: go on past the model's own end-of-sequence token.
        repetition_penalty: logits of tokens that occur in prompt or output are divided by this if positive, and
            multiplied if negative (Keskar et al., CTRL, arXiv 1909.05858, with the sign as transformers has it); 1 is
            off, more than 1 discourages.
        presence_penalty: subtracted from the logits of tokens that occur in the output, however often.
        frequency_penalty: subtracted from the logits of tokens once for each time that they occur in the output.
        logit_bias: added to the logits of the tokens named; ``-inf`` rules a token out.
        allowed_tokens: called before each choice with the tokens generated so far; gives the ids that may come next,
            or a mask ``[V]`` of bools. For grammars. It must not call the engine. An error in it ends this request
            alone.
        logprobs: report the log-probability of each chosen token, and of this many likeliest ones; None reports none.
            They are those of the model's own distribution, before penalties, bias, temperature and all else.
        stop: generation ends as soon as the text of the output holds one of these strings, over however many tokens
            it is spread. Needs the engine's tokenizer. The tokens that make up the string are returned; the text is
            cut before it.
        include_stop: the text keeps the stop string at its end.
    """

    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    seed: int | None = None
    stop_token_ids: tuple[int, ...] = field(default=())
    ignore_eos: bool = False
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: Mapping[int, float] = field(default_factory=dict, hash=False)
    allowed_tokens: AllowedTokens | None = None
    logprobs: int | None = None
    stop: tuple[str, ...] = ()
    include_stop: bool = False


def dtype_name(dtype: torch.dtype) -> str:
    """``torch.bfloat16`` -> ``"bfloat16"``."""
    return str(dtype).removeprefix("torch.")


@dataclass(frozen=True)
class FoldedRotation:
    """What became of a rotation around a cache.

    Attributes:
        cache: name of the cache's tensor in the graph, such as ``value_cache_0``.
        role: what the rows are: "key", "value", "query" or "output".
        module_path: module whose linear map the rotation is part of, or whose rows are rotated at each step.
        reason: why they are; empty where the rotation is part of the weights.
    """

    cache: str
    role: str
    module_path: str
    reason: str = ""
