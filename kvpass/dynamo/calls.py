"""A call of the user's model as a scope sees it: which argument holds the tokens, and what else there is."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from dataclasses import dataclass, replace
from enum import Enum
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from kvpass.adapters import IDS, POSITIONS, has_own_cache
from kvpass.dynamo.given_masks import CausalMask, read_causal

MASKS = ("attention_mask", "padding_mask", "mask", "attn_mask", "causal_mask", "tgt_mask", "src_mask")
PLAIN = (bool, int, float, complex, str, bytes, Enum, torch.dtype, torch.device, type(None))


class LeftAlone(Exception):
    """A scope cannot keep a cache for a call, which is computed as it would be outside; says why.

    Attributes:
        lasting: whether that is so of every call of its form.
    """

    def __init__(self, reason: str, lasting: bool = True) -> None:
        super().__init__(reason)
        self.lasting = lasting


@dataclass(frozen=True)
class ModelCall:
    """One call.

    Attributes:
        arguments: by name, as they were given; ``tokens`` is the name of the token ids ``[B, S]``, ``mask`` and
            ``positions`` of what may come with them, None where it was not given.
        causal: what the mask is, where it is one of queries and keys; else it is one of padding.
    """

    signature: inspect.Signature
    arguments: dict[str, Any]
    tokens: str
    mask: str | None = None
    positions: str | None = None
    causal: CausalMask | None = None

    @property
    def ids(self) -> Tensor:
        """Token ids ``[B, S]``."""
        return self._tensor(self.tokens)

    @property
    def attention_mask(self) -> Tensor | None:
        """Ones, and zeros at padding, of the shape of the ids; None where there is none."""
        return None if self.mask is None or self.causal is not None else self._tensor(self.mask)

    @property
    def position_ids(self) -> Tensor | None:
        """The position of each token; None where they are not given."""
        return None if self.positions is None else self._tensor(self.positions)

    @property
    def form(self) -> tuple[Any, ...]:
        """What two calls have in common that differ in their tokens alone."""
        roles = (self.tokens, self.mask, self.positions)
        others = {name: value for name, value in self.arguments.items() if name not in roles}
        dtypes = [self._tensor(name).dtype for name in roles if name is not None]
        return (*roles, *dtypes, self.causal, repr(sorted(others.items())))

    def _tensor(self, name: str) -> Tensor:
        found = self.arguments[name]
        assert isinstance(found, Tensor)
        return found

    def apart(self) -> ModelCall:
        """The same call with tensors of its own, of one number each; for who keeps it."""
        roles = [name for name in (self.tokens, self.mask, self.positions) if name is not None]
        return replace(self, arguments=self.arguments | {name: self._tensor(name).new_zeros(1) for name in roles})

    def for_tokens(self, ids: Tensor, positions: Tensor | None = None) -> dict[str, Tensor]:
        """What stands in the place of tokens, mask and positions for other ids ``[B, S]`` of rows without padding."""
        found = {self.tokens: ids}
        if self.mask is not None and self.causal is not None:
            found[self.mask] = self.causal.build(ids.shape[0], ids.shape[1], ids.device)
        elif self.mask is not None:
            found[self.mask] = torch.ones_like(ids, dtype=self._tensor(self.mask).dtype)
        if self.positions is not None:
            counted = torch.arange(ids.shape[1], device=ids.device).expand_as(ids) if positions is None else positions
            found[self.positions] = counted.to(self._tensor(self.positions).dtype)
        return found

    def bound(self, replaced: Mapping[str, Tensor]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """The arguments of the call, some of them replaced."""
        arguments = self.arguments | dict(replaced)
        bound = self.signature.bind_partial()
        for name, parameter in self.signature.parameters.items():
            if name in arguments:
                value = arguments[name]
                bound.arguments[name] = (value,) if parameter.kind is parameter.VAR_POSITIONAL else value
        return bound.args, bound.kwargs


@dataclass
class CallForm:
    """How a model is called.

    Attributes:
        signature: of its forward.
        has_own_cache: whether it keeps a cache of its own unless it is told not to.
        causal: the mask of queries and keys that it was given last.
    """

    signature: inspect.Signature
    has_own_cache: bool
    causal: CausalMask | None = None

    @classmethod
    def of(cls, model: nn.Module) -> CallForm:
        """That of a model."""
        return cls(inspect.signature(model.forward), has_own_cache(model))

    def read(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> ModelCall:
        """A call of the model.

        Raises:
            LeftAlone: if it has arguments that no cache knows of.
            TypeError: if the arguments do not fit the forward's signature.
        """
        bound = self.signature.bind(*args, **kwargs)
        arguments = dict(bound.arguments)
        for name, parameter in self.signature.parameters.items():
            if parameter.kind is parameter.VAR_POSITIONAL and len(arguments.get(name, ())) == 1:
                arguments[name] = arguments[name][0]
        if self.has_own_cache:
            more = next((p.name for p in self.signature.parameters.values() if p.kind is p.VAR_KEYWORD), "")
            if "use_cache" in self.signature.parameters:
                arguments.setdefault("use_cache", False)
            else:
                arguments[more] = {"use_cache": False} | arguments.get(more, {})
        names = [name for name, value in arguments.items() if isinstance(value, Tensor)]
        if not names:
            raise LeftAlone("the model is called without token ids")
        tokens = next(name for name in (*IDS, *names) if name in names)
        ids = arguments[tokens]
        if ids.dim() != 2 or ids.is_floating_point() or ids.dtype is torch.bool or 0 in ids.shape:
            raise LeftAlone(f"its argument {tokens} is no batch of token ids [batch, length], but {list(ids.shape)}")
        mask = next((name for name in MASKS if name in names and name != tokens), None)
        positions = next((name for name in POSITIONS if name in names and name != tokens), None)
        for name, value in arguments.items():
            if name in (tokens, mask, positions):
                continue
            if not all(isinstance(leaf, PLAIN) for leaf in pytree.tree_leaves(value)):
                raise LeftAlone(f"the model is given {name}, and what that means for a cache is not known")
        causal = None if mask is None else self._causal(arguments[mask], ids)
        for name in [name for name in (None if causal else mask, positions) if name is not None]:
            if arguments[name].shape not in (ids.shape, (1, ids.shape[1])):
                given, wanted = list(arguments[name].shape), list(ids.shape)
                raise LeftAlone(f"its argument {name} has shape {given}, and the token ids {wanted}")
        return ModelCall(self.signature, arguments, tokens, mask, positions, causal)

    def _causal(self, mask: Tensor, ids: Tensor) -> CausalMask | None:
        """What a mask of queries and keys is; None where it is one of padding.

        Raises:
            LeftAlone: if it may be either.
        """
        batch, length = ids.shape
        found = read_causal(mask, batch, length, self.causal)
        if found is not None and mask.shape == ids.shape and self.causal != found:
            raise LeftAlone("its mask has as many rows as tokens, and may be one of padding: give it more dims")
        self.causal = found or self.causal
        return found
