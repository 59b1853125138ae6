"""Whether a forward goes by lengths of earlier calls that it keeps as attributes of its modules."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from kvpass.errors import CaptureError

PRETENDED = (1, 1_000_003)  # lengths of an earlier call that the forward is made to believe in
MOST_APART = 1e-3  # of the largest logit
SYMBOLS = (torch.SymInt, torch.SymFloat, torch.SymBool)
Place = tuple[str, str]  # path of a module, and name of one of its attributes


@contextmanager
def kept_lengths(exported: nn.Module) -> Iterator[list[Place]]:
    """Where the modules of ``exported`` keep lengths once they have run in the block, which captures it."""
    found: list[Place] = []

    def look(*_: object) -> None:
        for path, module in exported.named_modules():
            found.extend((path, name) for name, value in vars(module).items() if isinstance(value, SYMBOLS))

    handle = exported.register_forward_hook(look)
    try:
        yield found
    finally:
        handle.remove()


def check_kept_lengths(model: nn.Module, places: list[Place], run: Callable[[], Tensor], path_prefix: str) -> None:
    """Refuse a forward whose logits change with a length that an earlier call has left in an attribute.

    The capture sees the first of all calls. Where that left a symbol in an attribute, a later call finds a length; most
    forwards only hand it on to another module. So the model runs with other lengths in its place.

    Args:
        model: as its owner has it; what is tried is taken back.
        places: where it keeps lengths.
        run: the logits of ``model`` on an example.
        path_prefix: path of the user's module in ``model``, left out of the message.

    Raises:
        CaptureError: naming the attribute.
    """
    modules = dict(model.named_modules())
    held = [(modules[path].__dict__, name, f"{path}.{name}") for path, name in dict.fromkeys(places) if path in modules]
    held = [(attributes, name, spelt) for attributes, name, spelt in held if name in attributes]
    if not held:
        return
    before = [(attributes, name, attributes[name]) for attributes, name, _ in held]
    try:
        wanted = run()
        for attributes, name, spelt in held:
            for length in PRETENDED:
                attributes[name] = length
                if not _is_as(_tried(run), wanted):
                    raise CaptureError(
                        f"the forward keeps a length in {spelt.removeprefix(f'{path_prefix}.')}, and its logits go by "
                        "the one that the call before left there: they are no function of the tokens. Have the "
                        "forward compute it anew in each call"
                    )
    finally:
        for attributes, name, was in before:
            attributes[name] = was


def _tried(run: Callable[[], Tensor]) -> Any:
    try:
        return run()
    except Exception:  # what it cannot do after some call depends on that call
        return None


def _is_as(found: Tensor | None, wanted: Tensor) -> bool:
    if found is None or found.shape != wanted.shape:
        return False
    return bool(((found - wanted).abs() <= MOST_APART * wanted.abs().max()).all())
