"""``verify``: original and rewritten graph, run against each other."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor
from torch.fx import Graph, GraphModule, Node

from kvpass.fx_passes.graph import CapturedGraph
from kvpass.fx_passes.lowering.bind import PagedModule
from kvpass.fx_passes.lowering.insert_cache import PagedGraph
from kvpass.fx_passes.lowering.prefix_steps import show_prefix
from kvpass.fx_passes.lowering.tree_steps import with_tree_mask
from kvpass.fx_passes.validation.bounds import SHARE, Bound, Noise
from kvpass.fx_passes.validation.rounded_caches import ROUNDING
from kvpass.kernels.formats.cache_formats import allocate_caches, find_format
from kvpass.kernels.formats.settling import SettlingTables
from kvpass.types import CachePlan, StepInputs

FEW_WEIGHTS = 64  # a dtype that a smaller part of the weights has does not loosen the bound
LONGEST = 640
ROUNDINGS = 8.0  # how many roundings of a lossy format, each at its worst, the logits may be off


def format_bound(plan: CachePlan) -> float:
    """Bound on the error of logits, relative to the largest, that the formats below 16 bits imply.

    It is a guard, not a promise of quality: what was measured is in the report. An error of the size of the logits
    never passes.
    """
    names = {name for spec in plan.caches for name in (spec.key_format, spec.value_format)}
    worst = max((ROUNDING[name] for name in names if name in ROUNDING), default=0.0)
    return min(0.9, ROUNDINGS * worst)


@dataclass
class Comparison:
    """How far the rewritten graph is from the original.

    Attributes:
        errors: for each check, its name and the largest difference over the rows that have to hold, relative to the
            largest logit.
        site_errors: the same for the result of each attention.
        tolerance: bound on every error.
        share: of the rows of each check that have to hold it.
        history_effect: change of the last logits when the first token is another one, on the same scale.
    """

    errors: dict[str, float] = field(default_factory=dict)
    site_errors: dict[str, float] = field(default_factory=dict)
    tolerance: float = 0.0
    share: float = 1.0
    history_effect: float = 0.0

    @property
    def passed(self) -> bool:
        """Every error is a number within the tolerance."""
        return all(error <= self.tolerance for error in self.errors.values())


def with_sites(module: GraphModule, graph: Graph, names: Sequence[str]) -> GraphModule:
    """The same graph, over the same tensors, that also returns the nodes called ``names``."""
    copied = Graph()
    known: dict[Node, Node] = {}
    result = copied.graph_copy(graph, known)
    logits = result[0] if isinstance(result, (tuple, list)) else result
    by_name = {node.name: node for node in known}
    copied.output((logits, *(known[by_name[name]] for name in names)))
    return GraphModule(module, copied)


def reference_graph(captured: CapturedGraph, names: Sequence[str]) -> GraphModule:
    """The canonical graph before caches are inserted, with the results of its attentions."""
    return with_sites(captured.module, captured.graph, names)


@torch.no_grad()
def verify(
    original: Callable[[Tensor], Tensor],
    reference: GraphModule,
    paged: PagedGraph,
    module: PagedModule,
    bound: float = 0.0,
) -> Comparison:
    """Run a ragged batch through the paged module in chunks and by single tokens, and the original on each sequence.

    Unused slots and foreign blocks hold NaN, blocks are in random order, and one sequence reads the prefix of another
    from the other's blocks.

    Args:
        original: the user's model: token ids ``[1, S]`` to logits ``[1, S, V]``.
        reference: from :func:`reference_graph`.
        paged: the rewritten graph.
        module: the rewritten graph, bound.
        bound: tolerance on the logits that lossy formats ask for, where it is larger than that of the dtypes.
    """
    run = Run(paged, module)
    wanted = [original(ids.unsqueeze(0))[0].float() for ids in run.sequences]
    scale = max(float(w.abs().max()) for w in wanted) or 1.0
    rows: dict[str, list[Tensor]] = {}
    for name, index, places, logits in run.steps():
        rows.setdefault(name, []).append(row_errors(logits, wanted[index][places], scale))
    if not module.plan.prefix:
        alone = original(run.sequences[0][:1].unsqueeze(0))[0].float()
        rows["single token"] = [row_errors(run.first_logits, alone, scale)]
    noise = Noise(dtypes_of(module), original, run.sequences)
    found = _within(noise.bound(), bound, rows)
    if not found.passed and _within(Bound(found.tolerance, SHARE), bound, rows).passed:  # a few rows alone differ
        found = _within(noise.bound_with_more(), bound, rows)
    found.site_errors = site_errors(run, reference, paged)
    found.history_effect = _history_effect(original, run.sequences[0], wanted[0], scale, module.plan)
    return found


def site_errors(run: Run, reference: GraphModule, paged: PagedGraph) -> dict[str, float]:
    """Largest difference of each attention's result on the first sequence, after all steps of a run."""
    found = {}
    sites = reference(run.sequences[0].unsqueeze(0), *run.position_ids(reference))[1:]
    for name, site, result in zip(paged.site_names, sites, run.site_rows(), strict=True):
        magnitude = float(site.float().abs().max()) or 1.0
        found[name] = logits_error(result.transpose(0, 1), site[0].transpose(0, 1).float(), magnitude, 1.0)
    return found


def _within(noise: Bound, formats: float, rows: dict[str, list[Tensor]]) -> Comparison:
    """The errors of all checks, given by row, against the larger of two bounds."""
    errors = {name: most_of(torch.cat(found), noise.share) for name, found in rows.items()}
    return Comparison(errors, tolerance=max(formats, noise.tolerance), share=noise.share)


def logits_error(got: Tensor, wanted: Tensor, scale: float, share: float) -> float:
    """Largest relative difference of a row, over the ``share`` of the rows that fit best; NaN counts as infinite."""
    return most_of(row_errors(got, wanted, scale), share)


def row_errors(got: Tensor, wanted: Tensor, scale: float) -> Tensor:
    """Largest difference of each row over ``scale``; NaN counts as infinite."""
    rows = (got.float() - wanted).abs().flatten(1).amax(1) / scale
    return torch.where(torch.isfinite(rows), rows, float("inf"))


def most_of(rows: Tensor, share: float) -> float:
    """The largest error of the ``share`` of the rows that fit best."""
    return float(rows.sort().values[max(0, int(len(rows) * share + 0.5) - 1)])


def _history_effect(
    original: Callable[[Tensor], Tensor], ids: Tensor, wanted: Tensor, scale: float, plan: CachePlan
) -> float:
    spoilt = ids.clone()
    allowed = allowed_tokens(plan)
    place = int(torch.searchsorted(allowed, spoilt[0].cpu()))
    spoilt[0] = allowed[(place + len(allowed) // 2 + 1) % len(allowed)]
    return float((original(spoilt.unsqueeze(0))[0, -1].float() - wanted[-1]).abs().max()) / scale


def allowed_tokens(plan: CachePlan) -> Tensor:
    """Token ids that a sequence may contain, int64, in order."""
    ids = torch.arange(plan.vocab_size)
    return ids[~torch.isin(ids, torch.tensor(plan.forbidden_tokens, dtype=torch.int64))]


class Run:
    """The sequences of one verification, their blocks, and the schedule of steps."""

    def __init__(self, paged: PagedGraph, module: PagedModule) -> None:
        self.plan: CachePlan = module.plan
        self.module = module
        self.device = module.device
        self.observed = paged.observed
        if self.plan.prefix:
            shown = with_tree_mask(paged.observed)
            assert isinstance(shown, GraphModule), "the module itself was refused before"
            self.shown = shown
        block = self.plan.block_size
        windows = [s.window for s in self.plan.caches if s.window is not None and s.window < LONGEST - 16]
        # blocks that settle do so behind two more, and the first never does
        blocks = 2 if not self.plan.settles else 5
        longest = max([blocks * block + 9, 41, *(w + 9 for w in windows)])
        longest = min(longest, LONGEST)
        if self.plan.prefix:  # a third of a sequence, and half of it but for some tokens, are prompts
            longest = max(longest, 3 * self.plan.prefix + 24)
        longest = min(longest, self.plan.max_length or longest)
        generator = torch.Generator().manual_seed(0)
        allowed = allowed_tokens(self.plan)
        ids = allowed[torch.randint(0, len(allowed), (3, longest), generator=generator)].to(self.device)
        self.shared = (longest - 1) // 2 // block * block
        second = torch.cat([ids[0, : self.shared], ids[1, : max(1, longest - self.shared - 5)]])
        self.sequences = [ids[0], second, ids[2, : max(1, longest // 3)]]
        self._allocate(generator)
        self.first_rows: list[list[Tensor]] = [[] for _ in paged.site_names]

    def _allocate(self, generator: torch.Generator) -> None:
        block = self.plan.block_size
        counts = [-(-len(s) // block) for s in self.sequences]
        groups, width = len(self.plan.group_windows), max(counts)
        total = groups * sum(counts) + 2
        free = torch.randperm(total, generator=generator).tolist()
        # Blocks [G, 3, W]: those of one group are foreign to all others.
        self.tables = torch.tensor(
            [[[free.pop() if i < n else 0 for i in range(width)] for n in counts] for _ in range(groups)]
        )
        self.tables[:, 1, : self.shared // block] = self.tables[:, 0, : self.shared // block]
        self.caches = allocate_caches(self.plan.caches, total, block, self.device, total)
        for tensor in (tensor for pair in self.caches for tensor in pair):
            tensor.view(torch.uint8).fill_(255)  # NaN in every float format, and as a scale
        self.blocks = SettlingTables(self.plan.caches, self.caches, total, block)

    def position_ids(self, reference: GraphModule) -> tuple[Tensor, ...]:
        """Position ids of the first sequence, where the captured graph takes them."""
        inputs = [n for n in reference.graph.nodes if n.op == "placeholder"]
        return (torch.arange(len(self.sequences[0]), device=self.device).unsqueeze(0),) if len(inputs) > 1 else ()

    def steps(self) -> list[tuple[str, int, slice, Tensor]]:
        """Run everything; gives name of the check, sequence, rows and logits of each piece."""
        a, b, c = (len(s) for s in self.sequences)
        cut = max(1, a - 7)
        start = min(self.shared, b - 1)
        done: list[tuple[str, int, slice, Tensor]] = []
        done += self._step("prefill", {0: (0, cut // 2)})
        done += self._step("ragged prefill in chunks", {2: (0, max(1, c - 2)), 0: (cut // 2, cut)})
        done += self._step("shared prefix", {1: (start, b), 0: (cut, min(cut + 1, a))})
        for i in range(cut + 1, a):
            tail = {2: (c - 1, c)} if i == cut + 1 and c > 2 else {}
            before = {2: (c - 2, c - 1)} if i == cut + 1 and c > 2 else {}
            if before:
                done += self._step("decode", before)
            done += self._step("decode", {0: (i, i + 1), **tail})
        return done

    def _step(self, name: str, work: dict[int, tuple[int, int]]) -> list[tuple[str, int, slice, Tensor]]:
        work = {i: span for i, span in work.items() if span[1] > span[0]}
        if not work:
            return []
        step = self._inputs(work)
        if self.plan.prefix:
            step = show_prefix(step, self.plan.prefix)
        observed = self.observed if step.tree_mask is None else self.shown
        logits, *sites = observed(*self.module.arguments(step, self.caches))
        if work.get(0, (1, 1))[0] == 0:
            self.first_logits = logits[0, :1]
        pieces, row = [], 0
        for index, (start, end) in work.items():
            pieces.append((name, index, slice(start, end), logits[0, row : row + end - start]))
            if index == 0:
                for kept, site in zip(self.first_rows, sites, strict=True):
                    kept.append(site[0, :, row : row + end - start].float())
            row += end - start
        return pieces

    def _inputs(self, work: dict[int, tuple[int, int]]) -> StepInputs:
        tokens, positions, rows = [], [], []
        lengths: list[int] = []
        starts = [0]
        for index, (start, end) in work.items():
            where = torch.arange(start, end)
            tokens.append(self.sequences[index][start:end])
            positions.append(where)
            rows.append(torch.full_like(where, len(lengths)))
            lengths.append(end)
            starts.append(starts[-1] + end - start)
        tables = self.tables[:, list(work)]
        self.blocks.settle(tables, torch.tensor([start for start, _ in work.values()]))
        slots, tables = self.blocks.inputs(tables, torch.cat(positions), torch.cat(rows))
        return StepInputs(
            torch.cat(tokens),
            torch.cat(positions).to(self.device),
            slots.to(self.device),
            tables.to(self.device),
            torch.tensor(lengths, device=self.device),
            torch.tensor(starts, device=self.device),
            torch.arange(starts[-1], device=self.device),
        )

    def site_rows(self) -> list[Tensor]:
        """Results of each attention on the first sequence, ``[Hq, S, Dv]``."""
        return [torch.cat(rows, 1) for rows in self.first_rows]


def dtypes_of(module: PagedModule) -> set[torch.dtype]:
    """The dtypes that take part in the arithmetic: of weights, but for a few numbers among many, and of caches."""
    counts: Counter[torch.dtype] = Counter()
    for parameter in module.parameters():
        if parameter.is_floating_point():
            counts[parameter.dtype] += parameter.numel()
    dtypes = {dtype for dtype, count in counts.items() if count * FEW_WEIGHTS >= counts.total()}
    for spec in module.plan.caches:
        dtypes |= {find_format(spec.key_format).dtype, find_format(spec.value_format).dtype}
    return dtypes
