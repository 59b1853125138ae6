"""What passes between the scheduler and whoever computes its steps."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TypeAlias

from kvpass.runtime.pool.state_slots import StateMove
from kvpass.runtime.sequences.sequence import Sequence

# Tokens ``start`` to ``end`` of a sequence, to be computed in one step; the last ones may be proposed ones. A plain
# tuple, since each step makes one for each sequence.
TokenRange: TypeAlias = tuple[Sequence, int, int]


@dataclass(frozen=True, eq=False)
class Step:
    """What is computed at once.

    Attributes:
        ranges: tokens of each sequence, oldest sequence first; empty when there is nothing to do.
        sampled: sequences whose next token is to be chosen: those whose range reaches their newest token, and after
            each the samples that follow it, who choose from the same logits.
        drafted: for each of ``sampled``, how many proposed tokens follow its newest one in the step. It has one row of
            logits more than that: behind its newest token, and behind each proposed one.
        copies: pairs (source, destination) of blocks whose content has to be copied before the step is computed, all
            at once; no two destinations are equal.
        state_moves: slots of recurrent states that have to be copied or zeroed before the step is computed.
        expired: sequences that were ended when the step was chosen, since their deadline was over.
    """

    ranges: tuple[TokenRange, ...]
    sampled: tuple[Sequence, ...]
    drafted: tuple[int, ...]
    copies: tuple[tuple[int, int], ...] = ()
    expired: tuple[Sequence, ...] = ()
    state_moves: tuple[StateMove, ...] = ()

    def scored(self) -> list[TokenRange]:
        """Those of the tokens whose logits are asked for beside what is sampled."""
        return [
            (sequence, max(start, sequence.scored_from), min(end, sequence.num_tokens - 1))
            for sequence, start, end in self.ranges
            if sequence.scored_from is not None and sequence.scored_from < min(end, sequence.num_tokens - 1)
        ]

    def finish(self, counts: SchedulerCounts, used: int, size: int) -> None:
        """Take note in the sequences that their ranges, of which there are some, are computed, and count it.

        Args:
            counts: are added to.
            used: blocks of the pool in use.
            size: tokens of a block.
        """
        computed = decoded = blocks = ends = 0
        for sequence, start, end in self.ranges:
            known = sequence.num_computed = end if end < sequence.num_tokens else sequence.num_tokens
            computed += known - start
            if known - start == 1 and start >= sequence.prompt_length:
                decoded += 1
            blocks += sequence.tables[0].num_blocks
            ends += end
        counts.steps += 1
        counts.prefill_tokens += computed - decoded
        counts.decode_tokens += decoded
        counts.unused_slots += (blocks * size - ends) * len(self.ranges[0][0].tables)
        counts.allocated_slots += used * size


@dataclass
class SchedulerCounts:
    """What a scheduler has done so far.

    Attributes:
        steps: steps computed.
        prefill_tokens: tokens of prompts computed, and of outputs computed again after a preemption.
        decode_tokens: new tokens computed one by one, proposed ones not counted.
        drafted_tokens: proposed tokens computed.
        drafted_trees: trees of them that were no chains.
        accepted_tokens: those of them that were generated.
        prefix_hit_tokens: tokens that were not computed because a registered block held them.
        prefix_lookup_tokens: tokens of all sequences that were started, each time that they were.
        restored_tokens: tokens that were not computed again because they had been swapped out.
        preemptions: sequences that had to give their blocks back before their end.
        allocated_slots: token slots of used blocks, summed over steps.
        unused_slots: those of them that held no token, summed over steps.
    """

    steps: int = 0
    prefill_tokens: int = 0
    decode_tokens: int = 0
    drafted_tokens: int = 0
    drafted_trees: int = 0
    accepted_tokens: int = 0
    prefix_hit_tokens: int = 0
    prefix_lookup_tokens: int = 0
    restored_tokens: int = 0
    preemptions: int = 0
    allocated_slots: int = 0
    unused_slots: int = 0
