"""``bind``: a paged graph becomes a module that takes one step at a time."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property

import torch
from torch import Tensor, nn
from torch.fx import GraphModule

from kvpass.errors import InputError
from kvpass.fx_passes.graph import aten, is_call
from kvpass.fx_passes.ledger_check import LedgerCheck
from kvpass.fx_passes.lowering.insert_cache import PagedGraph
from kvpass.fx_passes.lowering.mass_steps import with_mass
from kvpass.fx_passes.lowering.prefix_steps import show_prefix
from kvpass.fx_passes.lowering.tree_steps import with_tree_mask
from kvpass.types import CachePlan, Refusal, StepInputs


class PagedModule(nn.Module):
    """The rewritten model: one flattened step of T tokens, prefill and decode in any mix.

    It keeps no state but the model's own parameters: keys and values live in tensors that the caller owns and hands
    in at every step. Allocate them with :func:`kvpass.kernels.formats.cache_formats.allocate_caches`, one pair for each
    spec of ``plan.caches``, and own the blocks as you like; :class:`kvpass.Engine` is one such owner.

    Attributes:
        graph_module: the rewritten graph.
        plan: what is cached, in the order of the ``caches`` argument.
        guard: looks whether the model's tensors are those that it was compiled with; None where nobody does.
    """

    def __init__(self, paged: PagedGraph) -> None:
        super().__init__()
        self.graph_module = paged.module
        self.plan: CachePlan = paged.plan
        self.guard: LedgerCheck | None = None
        tensors = [*self.graph_module.parameters(), *self.graph_module.buffers()]
        self.device = tensors[0].device if tensors else torch.device("cpu")
        inputs = [node.name for node in self.graph_module.graph.nodes if node.op == "placeholder"]
        self.takes_position_ids = inputs[1] != "positions"
        slots = next(node for node in self.graph_module.graph.nodes if node.name == "slot_mapping")
        # Rows of slots and tables that the graph selects from.
        self._rows = 1 + max((int(user.args[2]) for user in slots.users if is_call(user, aten.select.int)), default=0)
        self.eval()

    @cached_property
    def tree_step(self) -> GraphModule | Refusal:
        """The graph of steps with a tree mask, made when it is first asked for; or why there is none."""
        if self.plan.settles:
            reason = "a cache in k4v2 stores blocks as a whole, and the rows of a tree are moved one by one"
            return Refusal(reason, pass_name="with-tree-mask")
        return with_tree_mask(self.graph_module)

    def forward(self, step: StepInputs, caches: Sequence[tuple[Tensor, Tensor]]) -> Tensor:
        """Compute one step.

        Args:
            step: the tokens of the step and where they belong, see :class:`kvpass.types.StepInputs`.
            caches: keys ``[B, Hkv, P, D]`` and values ``[B, Hkv, P, Dv]`` of every cache; changed in place at
                ``step.slot_mapping``.

        Returns:
            logits ``[R, V]`` of the rows ``step.logits_index``, in the model's dtype.

        Raises:
            InputError: if the step has a tree mask, and :attr:`tree_step` is a refusal; or a part of a prefix.
            WeightsChangedError: if a value that was read at compile time has changed since, before anything is written.
        """
        self._check_weights(step)
        if self.plan.prefix:
            step = show_prefix(step, self.plan.prefix)
        graph: GraphModule | Refusal = self.graph_module if step.tree_mask is None else self.tree_step
        if isinstance(graph, Refusal):
            raise InputError(f"a step of this model cannot have a tree mask: {graph}")
        logits = graph(*self.arguments(step, caches))
        result = logits[0] if isinstance(logits, (tuple, list)) else logits
        assert isinstance(result, Tensor)
        return result[0]

    @cached_property
    def mass_step(self) -> GraphModule:
        """The graph of steps that give the attention mass as well, made when it is first asked for."""
        return with_mass(self.graph_module, self.plan.block_size)

    def forward_with_mass(self, step: StepInputs, caches: Sequence[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
        """As :meth:`forward`, and the attention that blocks have received.

        Returns:
            logits ``[R, V]``; and float32 ``[N, W]``: for each entry of the block tables the weights that its tokens
            got in this step, summed over tokens, query heads and attentions.

        Raises:
            WeightsChangedError: as :meth:`forward`.
        """
        self._check_weights(step)
        (logits, *_), mass = self.mass_step(*self.arguments(step, caches))
        return logits[0], mass

    def _check_weights(self, step: StepInputs) -> None:
        if self.guard is not None:
            self.guard.check_step(len(step.token_ids), len(step.seq_lens))

    def arguments(self, step: StepInputs, caches: Sequence[tuple[Tensor, Tensor]]) -> list[Tensor]:
        """The step as its graph takes it: token ids ``[1, T]``, the step's tensors, the caches' tensors."""
        slots, tables = step.slot_mapping, step.block_tables
        if len(slots) < self._rows:  # no block is settled or wide: all caches have the same numbers
            slots, tables = torch.cat((slots, slots)), torch.cat((tables, tables))
        return [
            step.token_ids.unsqueeze(0),
            *([step.positions.unsqueeze(0)] if self.takes_position_ids else []),
            step.positions,
            slots,
            tables,
            step.seq_lens,
            step.query_start,
            step.logits_index,
            *([] if step.tree_mask is None else [step.tree_mask]),
            *(tensor for pair in caches for tensor in pair),
        ]
