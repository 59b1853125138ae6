"""The dialect ``native``: the ops of the graph as they are, for a runtime in which they are registered."""

from __future__ import annotations

from typing import Any

from kvpass.exporters.dialects.lowerings import Call, Facts, lowers

NATIVE = "native"


def no_trees(facts: Facts) -> str | None:
    """A mask of a tree of drafts."""
    return "a tree mask" if facts.get("tree_mask") is not None else None


@lowers("write_cache", NATIVE)
@lowers("norm_rotary_write", NATIVE)
@lowers("paged_attention", NATIVE, no_trees)
@lowers("latent_attention", NATIVE)
def as_it_is(call: Call) -> Any:
    """The very op of the graph."""
    whole = {name: value[0] if name in call.caches else value for name, value in call.given.items()}
    return call.target(**whole)
