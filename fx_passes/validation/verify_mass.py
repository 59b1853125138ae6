"""``verify_mass``: steps that give the attention mass, against those that do not."""

from __future__ import annotations

import torch

from kvpass.fx_passes.lowering.bind import PagedModule
from kvpass.fx_passes.validation.verify import LONGEST, Comparison, format_bound, logits_error
from kvpass.fx_passes.validation.verify_trees import PARENTS, OneSequence


@torch.no_grad()
def verify_mass(module: PagedModule) -> Comparison:
    """Compare the logits of one sequence, in a chunk and by single tokens, with and without the mass.

    What blocks receive is checked to be finite, not negative, and the same whether tokens are computed in one step or
    in several.
    """
    found = Comparison()
    length = min(2 * module.plan.block_size + 9, (module.plan.max_length or LONGEST) - len(PARENTS))
    if length < 2:
        return found
    run = OneSequence(module, length)
    bound = run.bound(length)
    found.tolerance, share = max(format_bound(module.plan), bound.tolerance), bound.share
    tokens = run.tokens[:length]
    wanted = run.step(0, tokens)
    scale = float(wanted.abs().max()) or 1.0
    got, whole = module.forward_with_mass(run.inputs(0, tokens), run.caches)
    found.errors["a chunk with attention mass"] = logits_error(got, wanted, scale, share)
    parts = []
    for start, stop in ((0, length - 2), (length - 2, length - 1), (length - 1, length)):
        got, mass = module.forward_with_mass(run.inputs(start, tokens[start:stop]), run.caches)
        found.errors[f"tokens {start} to {stop} with attention mass"] = logits_error(
            got, wanted[start:stop], scale, share
        )
        parts.append(mass)
    received = torch.stack(parts).sum(0)
    total = float(whole.sum()) or 1.0
    if not bool((whole >= 0).all()):
        total = 0.0
    found.errors["attention mass in parts"] = logits_error(received, whole, total, 1.0) if total else float("inf")
    return found
