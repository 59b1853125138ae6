"""Whether a drafter can propose tokens for an engine."""

from __future__ import annotations

from typing import Any

from kvpass.config import CacheConfig
from kvpass.engine.step_module import StepModule
from kvpass.errors import ConfigError, VerificationError
from kvpass.fx_passes.lowering.bind import PagedModule
from kvpass.fx_passes.validation.verify_trees import verify_trees
from kvpass.report import RewriteReport
from kvpass.types import CachePlan, HeavyHitters, Refusal


def check_drafter(
    drafter: Any, module: StepModule, plan: CachePlan, config: CacheConfig, report: RewriteReport
) -> None:
    """Look at what a drafter is, and at whether the engine's module takes what it proposes.

    Raises:
        ConfigError: if it is none, or the engine cannot have drafts, or no trees of them.
        VerificationError: if the module gives other logits for tokens in a tree.
    """
    if not all(callable(getattr(drafter, name, None)) for name in ("propose", "forget")):
        raise ConfigError(f"{drafter!r} is no drafter: give kvpass.PromptLookup(), kvpass.DraftEngine(engine) or None")
    if plan.states:
        raise ConfigError(
            "this module has recurrent states, from which rejected drafts cannot be taken back: leave out drafts"
        )
    if isinstance(config.forgetting, HeavyHitters):
        raise ConfigError(
            "tokens are forgotten by the attention that they receive, and that of rejected drafts would count: "
            "leave out drafts or kvpass.HeavyHitters"
        )
    if getattr(drafter, "branches", 1) > 1:
        check_trees(module, report)


def check_trees(module: StepModule, report: RewriteReport) -> None:
    """Prove that a module computes the nodes of a tree as it computes sequences.

    Raises:
        ConfigError: if it takes no trees; names the reason.
        VerificationError: if it does, and the logits of a tree's paths differ from those of sequences.
    """
    if not isinstance(module, PagedModule):
        if not getattr(module, "takes_trees", False):
            raise ConfigError(f"a {type(module).__name__} takes no trees of drafts: give a drafter with branches=1")
        return
    if isinstance(module.tree_step, Refusal):
        raise ConfigError(f"this model takes no trees of drafts: {module.tree_step}; give a drafter with branches=1")
    found = verify_trees(module)
    if not found.passed:
        errors = ", ".join(f"{name} {error:.1e}" for name, error in found.errors.items())
        raise VerificationError(
            f"trees of drafts give other logits than sequences, and are not used: {errors}, more than "
            f"{found.tolerance:.1e} of the largest",
            report,
        )
