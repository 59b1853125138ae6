"""One request on its way: its tokens, its blocks, and how far it is computed."""

from __future__ import annotations

from collections.abc import Collection
from collections.abc import Sequence as Ordered
from enum import Enum
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from kvpass.errors import IntegrityError
from kvpass.runtime.pool.block_table import BlockTable
from kvpass.runtime.prefix.prefix_nodes import Branch, TokenArray
from kvpass.runtime.sequences.draft_tree import DraftTree, chain
from kvpass.runtime.sequences.output_text import OutputText
from kvpass.runtime.tiers.tiers import Prefetch
from kvpass.types import FinishReason, Sampling, TokenLogprobs

_FIRST_CAPACITY = 16
NOTHING_RECEIVED: NDArray[np.float64] = np.zeros(0)


class SequenceState(Enum):
    """Where a sequence is in its life."""

    NEW = "new"
    WAITING = "waiting"
    RUNNING = "running"
    FINISHED = "finished"


class Rank(NamedTuple):
    """Place of a sequence in the order of service; no two are equal.

    Attributes:
        start: tokens of work before it, by the clock of :mod:`kvpass.runtime.schedule.waiting_queue`.
        arrival: place in the order of arrival.
    """

    start: int
    arrival: int


class Sequence:
    """A prompt and the tokens generated after it.

    The cache of the first ``num_computed`` tokens is in the blocks of the tables. The newest token is known before it
    is computed, so ``num_computed < num_tokens`` until the sequence has finished.

    Attributes:
        prompt_length: tokens of the prompt.
        max_new_tokens: generation ends after this many new tokens.
        sampling: how new tokens are chosen.
        seed: the request's seed, ``sampling.seed`` or a fresh one.
        stop_ids: generation ends after one of these tokens.
        forbidden_ids: tokens after which nothing can be computed; generating one of these ends in error.
        vocab_size: the model can look up the tokens below; generating another ends in error. None for any.
        priority: of two sequences the one with the larger number is served first, unless the other waited long.
        tenant: on whose behalf it is; tenants get equal shares.
        deadline: when it is ended unless it has ended before, on the scheduler's clock; None for never.
        namespace: blocks are shared with sequences of the same namespace only.
        leader: the sample of the same prompt that computes it for this one too; None once this one goes its own way.
        held: all its tokens are computed, and it gets its next one from elsewhere: see
            :meth:`kvpass.runtime.schedule.scheduler.Scheduler.extend`.
        rank: place in the order of service, given by the scheduler.
        state: where the sequence is in its life.
        finish_reason: why it finished; None before, and when it was cancelled.
        num_tokens: tokens of prompt and output.
        newest: the last one of them.
        num_computed: tokens whose cache is written; 0 whenever the sequence has no blocks.
        num_draft: tokens proposed to follow the newest one, to be computed with it in the next step.
        draft_parents: of each proposed token the place of the one that it follows, see
            :class:`kvpass.runtime.sequences.draft_tree.DraftTree`; None where each follows the one before it.
        tables: its blocks in each group.
        received: attention that each of its blocks which are there has received, in their order, float64; only where
            it decides what is forgotten, and no longer than was needed so far.
        shares_tail: the block that holds its newest computed token may have other owners, and is then copied before
            it is written.
        swapped: handle of the content of its blocks, ``swapped_tokens`` of them, in host memory; None where it is not.
        state_slot: where its recurrent states are while it runs; None where there are none.
        ahead: what is being read of its cache for it, before it starts; None if nothing is.
        branch: place in the prefix tree up to which the blocks are registered; None without prefix sharing.
        num_registered: blocks of each group from the front that are on the path to ``branch``.
        text: the output as text; None unless the request has stop strings.
        logprobs: of each generated token, where the request asks for them.
        failure: why it finished in error, where that is known and not in its tokens or logits.
        scored_from: place of the first token whose logits are still to be handed out, all that follow included; None
            where only the newest token's are wanted.
    """

    __slots__ = (
        "_tokens",
        "ahead",
        "branch",
        "deadline",
        "draft_parents",
        "failure",
        "finish_reason",
        "forbidden_ids",
        "held",
        "leader",
        "logprobs",
        "max_new_tokens",
        "namespace",
        "newest",
        "num_computed",
        "num_draft",
        "num_registered",
        "num_tokens",
        "priority",
        "prompt_length",
        "rank",
        "received",
        "sampling",
        "scored_from",
        "seed",
        "shares_tail",
        "state",
        "state_slot",
        "stop_ids",
        "swapped",
        "swapped_tokens",
        "tables",
        "tenant",
        "text",
        "vocab_size",
    )

    def __init__(
        self,
        prompt: list[int],
        max_new_tokens: int,
        sampling: Sampling,
        seed: int,
        stop_ids: Collection[int] = (),
        forbidden_ids: Collection[int] = (),
        text: OutputText | None = None,
    ) -> None:
        self.prompt_length = len(prompt)
        self.max_new_tokens = max_new_tokens
        self.sampling = sampling
        self.seed = seed
        self.stop_ids = frozenset(stop_ids)
        self.forbidden_ids = frozenset(forbidden_ids)
        self.vocab_size: int | None = None
        self.priority = 0
        self.tenant = ""
        self.deadline: float | None = None
        self.namespace = ""
        self.ahead: Prefetch | None = None
        self.leader: Sequence | None = None
        self.held = False
        self.rank: Rank | None = None
        self.state = SequenceState.NEW
        self.finish_reason: FinishReason | None = None
        self.num_tokens = len(prompt)
        self.newest = prompt[-1] if prompt else 0
        self.num_computed = 0
        self.num_draft = 0
        self.draft_parents: list[int] | None = None
        self.tables: tuple[BlockTable, ...] = (BlockTable(),)
        self.received = NOTHING_RECEIVED
        self.shares_tail = False
        self.swapped: object | None = None
        self.swapped_tokens = 0
        self.state_slot: int | None = None
        self.branch: Branch | None = None
        self.num_registered = 0
        self.text = text
        self.logprobs: list[TokenLogprobs] = []
        self.failure: str | None = None
        self.scored_from: int | None = None
        # Grows by doubling: what a request asks for at most is no measure of what it will need.
        self._tokens: TokenArray = np.array(prompt, dtype=np.int32)

    @property
    def tokens(self) -> TokenArray:
        """Prompt and output, ``[num_tokens]``; a view."""
        return self._tokens[: self.num_tokens]

    @property
    def num_output(self) -> int:
        """Tokens generated so far."""
        return self.num_tokens - self.prompt_length

    @property
    def output(self) -> list[int]:
        """Tokens generated so far."""
        return self.output_from(0)

    @property
    def max_cached_tokens(self) -> int:
        """Most tokens whose cache will ever be needed; the last new token is never computed."""
        return self.prompt_length + self.max_new_tokens - 1

    def output_from(self, start: int) -> list[int]:
        """Generated tokens, without the first ``start`` ones."""
        output: list[int] = self._tokens[self.prompt_length + start : self.num_tokens].tolist()
        return output

    @property
    def draft(self) -> list[int]:
        """The proposed tokens."""
        draft: list[int] = self._tokens[self.num_tokens : self.num_tokens + self.num_draft].tolist()
        return draft

    def draft_tree(self, count: int) -> DraftTree:
        """The first ``count`` proposed tokens, and what each of them follows."""
        if self.draft_parents is None:
            return chain(self.draft[:count])
        return DraftTree(self.draft, self.draft_parents).cut(count)

    def propose(self, tokens: Ordered[int], parents: list[int] | None = None) -> None:
        """Propose ``tokens`` to follow the newest one, in place of what was proposed before.

        They are computed together with it, as far as tokens and blocks are to spare, and logits come for each. No more
        are taken than may still be generated, less the one that the last logits give. None are computed where there are
        recurrent states, which cannot take back a token that turns out to be wrong.

        Args:
            tokens: the proposed ones.
            parents: place in ``tokens`` of the one that each follows, an earlier one, or -1; None for a chain.
        """
        self.num_draft = max(0, min(len(tokens), self.max_cached_tokens - self.num_tokens))
        self.draft_parents = None if parents is None else parents[: self.num_draft]
        end = self.num_tokens + self.num_draft
        if end > len(self._tokens):
            self._tokens = _grown(self._tokens, end)
        self._tokens[self.num_tokens : end] = tokens[: self.num_draft]

    def tokens_to_compute(self, start: int, end: int) -> TokenArray:
        """Tokens ``start`` to ``end`` of prompt, output and draft; a view."""
        return self._tokens[start:end]

    def append(self, token: int) -> None:
        """Add a generated token, and finish if it is the last one; nothing is proposed any more."""
        if self.num_tokens == len(self._tokens):
            self._tokens = _grown(self._tokens, self.num_tokens + 1)
        self._tokens[self.num_tokens] = token
        self.newest = token
        self.num_tokens += 1
        self.num_draft = 0
        if self.text is not None and self._is_stopped_by_text(self.text):
            return
        if token in self.stop_ids:
            self.finish("stop")
        elif self.num_tokens - self.prompt_length >= self.max_new_tokens:
            self.finish("length")
        elif token in self.forbidden_ids or (self.vocab_size is not None and token >= self.vocab_size):
            self.finish("error")

    def _is_stopped_by_text(self, text: OutputText) -> bool:
        """Whether the newest tokens complete a stop string, or cannot be decoded; the sequence is finished then."""
        try:
            # By count and not by token: an exception may have come between a token and its text.
            if text.add(self.output_from(text.num_tokens)):
                self.finish("stop")
        except Exception as error:  # the caller's tokenizer: whatever is wrong with it ends this request alone
            self.failure = f"its tokens could not be decoded to look for stop strings: {type(error).__name__}: {error}"
            self.finish("error")
        return self.state is SequenceState.FINISHED

    def finish(self, reason: FinishReason | None) -> None:
        """End the sequence; its blocks are the scheduler's to give back."""
        self.state = SequenceState.FINISHED
        self.finish_reason = reason

    def forked(self, seed: int) -> Sequence:
        """A new sequence with the same tokens and options, that draws by another seed. It has no blocks and no rank."""
        twin = Sequence(
            self._tokens[: self.prompt_length].tolist(),
            self.max_new_tokens,
            self.sampling,
            seed,
            self.stop_ids,
            self.forbidden_ids,
            None if self.text is None else self.text.copy(),
        )
        twin._tokens = self._tokens.copy()
        twin.num_tokens, twin.newest, twin.held = self.num_tokens, self.newest, self.held
        twin.logprobs = list(self.logprobs)
        twin.vocab_size, twin.priority, twin.tenant = self.vocab_size, self.priority, self.tenant
        twin.deadline, twin.namespace = self.deadline, self.namespace
        return twin

    def replace_newest(self, token: int) -> None:
        """Put ``token`` in the place of the newest generated one, which is not computed yet, and finish if it ends.

        Text is not followed: for requests without stop strings.
        """
        if self.num_output == 0 or self.num_computed >= self.num_tokens or self.text is not None:
            raise IntegrityError("only a generated token that is not computed yet can be replaced")
        self.num_tokens -= 1
        self.append(token)

    def take_blocks(self) -> list[int]:
        """Empty the tables and return their blocks; nothing is computed any more."""
        blocks = [block for table in self.tables for block in table.take_end(0)]
        self.num_computed = 0
        self.num_draft = 0
        self.num_registered = 0
        self.received = NOTHING_RECEIVED
        self.shares_tail = False
        self.branch = None
        return blocks


def _grown(array: TokenArray, size: int) -> TokenArray:
    grown = np.empty(max(2 * len(array), size, _FIRST_CAPACITY), dtype=array.dtype)
    grown[: len(array)] = array
    return grown
