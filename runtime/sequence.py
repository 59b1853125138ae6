"""One request on its way: its tokens, its blocks, and how far it is computed."""

from __future__ import annotations

from collections.abc import Collection
from collections.abc import Sequence as Ordered
from enum import Enum
from typing import Any

import numpy as np
from numpy.typing import NDArray

from kvpass.runtime.output_text import OutputText
from kvpass.runtime.prefix_cache import Branch, TokenArray
from kvpass.types import FinishReason, Sampling, TokenLogprobs

_FIRST_CAPACITY = 16


class SequenceState(Enum):
    """Where a sequence is in its life."""

    NEW = "new"
    WAITING = "waiting"
    RUNNING = "running"
    FINISHED = "finished"


class Sequence:
    """A prompt and the tokens generated after it.

    The cache of the first ``num_computed`` tokens is in the blocks of the table. The newest token is known before it
    is computed, so ``num_computed < num_tokens`` until the sequence has finished.

    Attributes:
        prompt_length: tokens of the prompt.
        max_new_tokens: generation ends after this many new tokens.
        sampling: how new tokens are chosen.
        seed: the request's seed, ``sampling.seed`` or a fresh one.
        stop_ids: generation ends after one of these tokens.
        forbidden_ids: tokens after which nothing can be computed; generating one of these ends in error.
        arrival: place in the order of arrival, given by the scheduler.
        state: where the sequence is in its life.
        finish_reason: why it finished; None before, and when it was cancelled.
        num_tokens: tokens of prompt and output.
        num_computed: tokens whose cache is written; 0 whenever the sequence has no blocks.
        num_draft: tokens proposed to follow the newest one, to be computed with it in the next step.
        num_blocks: blocks in the table, those that were given back included.
        num_passed: blocks from the front of the table that no query to come can see; they were given back, and their
            entries are 0.
        branch: place in the prefix trie up to which the blocks are registered; None without prefix sharing.
        num_registered: blocks from the front of the table that are on the path to ``branch``.
        text: the output as text; None unless the request has stop strings.
        logprobs: of each generated token, where the request asks for them.
        failure: why it finished in error, where that is known and not in its tokens or logits.
    """

    __slots__ = (
        "_table",
        "_tokens",
        "arrival",
        "branch",
        "failure",
        "finish_reason",
        "forbidden_ids",
        "logprobs",
        "max_new_tokens",
        "num_blocks",
        "num_computed",
        "num_draft",
        "num_passed",
        "num_registered",
        "num_tokens",
        "prompt_length",
        "sampling",
        "seed",
        "state",
        "stop_ids",
        "text",
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
        self.arrival = 0
        self.state = SequenceState.NEW
        self.finish_reason: FinishReason | None = None
        self.num_tokens = len(prompt)
        self.num_computed = 0
        self.num_draft = 0
        self.num_blocks = 0
        self.num_passed = 0
        self.branch: Branch | None = None
        self.num_registered = 0
        self.text = text
        self.logprobs: list[TokenLogprobs] = []
        self.failure: str | None = None
        # Both grow by doubling: what a request asks for at most is no measure of what it will need.
        self._tokens: TokenArray = np.array(prompt, dtype=np.int32)
        self._table: NDArray[np.int64] = np.empty(0, dtype=np.int64)

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
    def table(self) -> NDArray[np.int64]:
        """Block table, ``[num_blocks]``: the blocks in the order of the tokens, 0 for those passed; a view."""
        return self._table[: self.num_blocks]

    @property
    def blocks(self) -> list[int]:
        """The blocks that the sequence owns, in the order of the tokens."""
        owned: list[int] = self._table[self.num_passed : self.num_blocks].tolist()
        return owned

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

    def propose(self, tokens: Ordered[int]) -> None:
        """Propose ``tokens`` to follow the newest one, in place of what was proposed before.

        They are computed together with it, as far as tokens and blocks are to spare, and logits come for each. No more
        are taken than may still be generated, less the one that the last logits give.
        """
        self.num_draft = max(0, min(len(tokens), self.max_cached_tokens - self.num_tokens))
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
        self.num_tokens += 1
        self.num_draft = 0
        if self._is_stopped_by_text():
            return
        if token in self.stop_ids:
            self.finish("stop")
        elif self.num_output >= self.max_new_tokens:
            self.finish("length")
        elif token in self.forbidden_ids:
            self.finish("error")

    def _is_stopped_by_text(self) -> bool:
        """Whether the newest tokens complete a stop string, or cannot be decoded; the sequence is finished then."""
        if self.text is None:
            return False
        try:
            # By count and not by token: an exception may have come between a token and its text.
            if self.text.add(self.output_from(self.text.num_tokens)):
                self.finish("stop")
        except Exception as error:  # the caller's tokenizer: whatever is wrong with it ends this request alone
            self.failure = f"its tokens could not be decoded to look for stop strings: {type(error).__name__}: {error}"
            self.finish("error")
        return self.state is SequenceState.FINISHED

    def finish(self, reason: FinishReason | None) -> None:
        """End the sequence; its blocks are the scheduler's to give back."""
        self.state = SequenceState.FINISHED
        self.finish_reason = reason

    def add_blocks(self, blocks: list[int]) -> None:
        """Append blocks to the table."""
        end = self.num_blocks + len(blocks)
        if end > len(self._table):
            self._table = _grown(self._table, end)
        self._table[self.num_blocks : end] = blocks
        self.num_blocks = end

    def replace_block(self, position: int, block: int) -> int:
        """Put ``block`` at ``position`` of the table and return the block that was there."""
        old = int(self._table[position])
        self._table[position] = block
        return old

    def pass_blocks(self, count: int) -> list[int]:
        """Take the first ``count`` blocks out of the table, as far as they are still in it, and return them."""
        passed: list[int] = self._table[self.num_passed : count].tolist()
        self._table[self.num_passed : count] = 0
        self.num_passed = max(self.num_passed, count)
        return passed

    def take_blocks(self) -> list[int]:
        """Empty the table and return its blocks; nothing is computed any more."""
        blocks = self.blocks
        self.num_blocks = 0
        self.num_passed = 0
        self.num_computed = 0
        self.num_draft = 0
        self.num_registered = 0
        self.branch = None
        return blocks


def _grown(array: NDArray[Any], size: int) -> NDArray[Any]:
    grown = np.empty(max(2 * len(array), size, _FIRST_CAPACITY), dtype=array.dtype)
    grown[: len(array)] = array
    return grown
