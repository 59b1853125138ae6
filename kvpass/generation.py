"""transformers' ``generate`` over a paged cache: ``custom_generate=kvpass.generate``, or ``kvpass.patch(model)``.

transformers keeps its loops: greedy, sampling and beams, with its processors, criteria, streamers and outputs. They run
on a shallow copy of the model whose forward gives the logits of the last tokens, as a forward without a cache would;
rows are found again by their content (:mod:`kvpass.engine.row_session`).
"""

from __future__ import annotations

import copy
import threading
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

from torch import Tensor

from kvpass.compiler import compile
from kvpass.config import CacheConfig
from kvpass.engine.engine import Engine
from kvpass.engine.padded_rows import check_positions, present_tokens
from kvpass.engine.row_session import Row, RowSession
from kvpass.errors import InputError, WeightsChangedError

# transformers' own loops, by its names of the ways to generate.
LOOPS = {"greedy_search": "_sample", "sample": "_sample", "beam_search": "_beam_search", "beam_sample": "_beam_search"}
CACHES = ("cache", "past_key_values")  # what transformers' own cache is called, by version
# What a forward is given that the rows say already, or that only shapes what it returns.
UNDERSTOOD = frozenset({
    *CACHES, "attention_mask", "position_ids", "cache_position", "use_cache", "logits_to_keep", "return_dict",
    "output_attentions", "output_hidden_states", "next_sequence_length", "is_first_iteration",
})  # fmt: skip
NEVER_BOTH = "kvpass.patch(model, config) says how its cache is made, and a model has one: patch it before it generates"

PLACE = "_kvpass"  # attribute of a model
_LOCK = threading.RLock()


@dataclass
class Door:
    """What is kept of a model, as an attribute of it, so that it goes with the model; a copy of the model has none.

    Attributes:
        config: formats and size of its cache; None for the defaults.
        engine: None until it first generates.
    """

    config: CacheConfig | None = None
    engine: Engine | None = None

    def __deepcopy__(self, memo: object) -> Door:
        return Door(self.config)

    def __reduce__(self) -> tuple[type[Door], tuple[CacheConfig | None]]:
        return Door, (self.config,)


def generate(
    model: Any,
    input_ids: Tensor,
    logits_processor: Any = None,
    stopping_criteria: Any = None,
    generation_config: Any = None,
    **kwargs: Any,
) -> Any:
    """Generate as transformers does, over kvpass's cache: ``model.generate(..., custom_generate=kvpass.generate)``.

    The model is compiled at the first call, and again after its weights have changed where they decided something. What
    comes back is what ``generate`` gives without: ids, or its own classes with ``return_dict_in_generate``.

    Args:
        model: a decoder of transformers, in eval mode.
        input_ids: ids ``[B, S]``, as ``generate`` hands them on; so are all others.
        logits_processor: likewise.
        stopping_criteria: likewise.
        generation_config: likewise; its ``use_cache`` and ``cache_implementation`` are of transformers' own cache.
        kwargs: what the forward is given, and ``streamer``, which transformers does not hand on to a custom loop: bind
            it, ``custom_generate=functools.partial(kvpass.generate, streamer=...)``; :func:`patch` does. There is no
            assisted generation.

    Raises:
        InputError: for what a cache cannot serve: another way to generate, embeddings, attentions or hidden states in
            the output, padding on the right, positions that do not follow from the mask, other inputs of the forward.
        RefusedError: if the model cannot be rewritten.
        VerificationError: likewise.
        CapacityError: if the pool is too small for one of the rows even alone.
    """
    mode = generation_config.get_generation_mode()
    loop = LOOPS.get(mode.value)
    if loop is None:
        raise InputError(f"kvpass.generate does not serve {mode.value}: it serves {', '.join(LOOPS)}")
    _check(generation_config, kwargs)
    for name in CACHES:
        kwargs.pop(name, None)
    longest = generation_config.max_length
    with RowSession(engine_of(model), longest) as session:
        proxy = copy.copy(model)
        proxy.forward = _forward(session, input_ids.shape[1], _ends(generation_config))
        config = copy.copy(generation_config)
        config.use_cache, kwargs["use_cache"] = False, False
        run: Callable[..., Any] = getattr(type(proxy), loop)
        return run(
            proxy,
            input_ids,
            logits_processor=logits_processor,
            stopping_criteria=stopping_criteria,
            generation_config=config,
            **kwargs,
        )


def patch(model: Any, config: CacheConfig | None = None) -> Any:
    """Have every ``model.generate(...)`` go through kvpass, also where a pipeline calls it; gives the model.

    Args:
        model: a decoder of transformers, in eval mode.
        config: formats and size of its cache.

    Raises:
        InputError: if it has no ``generate``, or was compiled with another configuration already.
    """
    if not callable(getattr(model, "generate", None)):
        raise InputError(f"a {type(model).__name__} has no generate to be patched: give a decoder of transformers")
    with _LOCK:
        door = _door_of(model)
        if config is not None:
            if door.engine is not None and door.engine.config != config:
                raise InputError(NEVER_BOTH)
            door.config = config
    model.generate = partial(_generate_by_default, type(model).generate, model)
    return model


def _generate_by_default(original: Callable[..., Any], model: Any, *args: Any, **kwargs: Any) -> Any:
    # transformers hands neither a streamer on to a custom loop, nor the tokenizer that looks for strings.
    strings = kwargs.pop("stop_strings", None)
    if strings is not None:
        from transformers import StoppingCriteriaList, StopStringCriteria

        tokenizer = kwargs.pop("tokenizer", None)
        if tokenizer is None:
            raise InputError("stop_strings are looked for in text: pass tokenizer=... to generate as well")
        criteria = kwargs.get("stopping_criteria") or ()
        kwargs["stopping_criteria"] = StoppingCriteriaList([*criteria, StopStringCriteria(tokenizer, strings)])
    streamer = kwargs.get("streamer")
    kwargs.setdefault("custom_generate", generate if streamer is None else partial(generate, streamer=streamer))
    return original(model, *args, **kwargs)


def engine_of(model: Any) -> Engine:
    """The engine through which a model generates, compiled where there is none that can go on.

    Raises:
        InputError: as :func:`kvpass.compile`.
        RefusedError: likewise.
        VerificationError: likewise.
    """
    with _LOCK:
        door = _door_of(model)
        if door.engine is not None:
            try:
                door.engine._weights.check()
                return door.engine
            except WeightsChangedError:
                door.engine.close()
                door.engine = None
        door.engine = compile(model, door.config)
        return door.engine


def _door_of(model: Any) -> Door:
    door = model.__dict__.get(PLACE)
    if door is None:
        door = model.__dict__[PLACE] = Door()
    return door  # type: ignore[no-any-return]


def _check(generation_config: Any, kwargs: dict[str, Any]) -> None:
    if kwargs.get("inputs_embeds") is not None:
        raise InputError("inputs_embeds are no tokens, and rows are known by their tokens: pass input_ids")
    for name in ("output_attentions", "output_hidden_states"):
        if getattr(generation_config, name, False):
            raise InputError(f"{name}=True asks for what is never computed with a cache of kvpass: leave it out")
    if getattr(generation_config, "prefill_chunk_size", None) is not None:
        raise InputError("prefill_chunk_size is of transformers' own cache: give CacheConfig(max_batch_tokens=...)")


def _ends(generation_config: Any) -> frozenset[int]:
    found = generation_config.eos_token_id
    return frozenset(() if found is None else [found] if isinstance(found, int) else found)


def _forward(session: RowSession, prompt: int, ends: frozenset[int]) -> Callable[..., Any]:
    """A forward that gives the logits of the last token of each row, of rows whose first ``prompt`` are padded."""
    from transformers.modeling_outputs import CausalLMOutputWithPast

    def forward(
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        **others: Any,
    ) -> Any:
        unknown = sorted(name for name, value in others.items() if value is not None and name not in UNDERSTOOD)
        if unknown:
            raise InputError(f"the forward is given {unknown[0]}, which kvpass.generate does not know: leave it out")
        if input_ids is None:
            raise InputError("the forward is given no input_ids: rows are known by their tokens")
        rows = rows_of(input_ids, attention_mask, position_ids)
        live = [_until_the_end(row, len(row) - max(0, input_ids.shape[1] - prompt), ends) for row in rows]
        logits = session.logits(live)
        return CausalLMOutputWithPast(logits=logits[:, None])

    return forward


def _until_the_end(row: Row, prompt: int, ends: frozenset[int]) -> Row:
    """The row up to the first token that ends it, after which transformers pads and looks at no logits."""
    for place in range(max(0, prompt), len(row)):
        if row[place] in ends:
            return row[: place + 1]
    return row


def rows_of(input_ids: Tensor, attention_mask: Tensor | None, position_ids: Tensor | None = None) -> list[Row]:
    """The tokens of each row of a batch without its padding.

    Args:
        input_ids: ids ``[B, S]``.
        attention_mask: ones and zeros ``[B, S]``; None where nothing is padded.
        position_ids: ``[B, S]`` or ``[1, S]``; None where they follow from the mask.

    Raises:
        InputError: if a row ends in padding or is nothing else, or its positions do not count its tokens.
    """
    mask = present_tokens(input_ids, attention_mask)
    if not bool(mask[:, -1].all()):
        raise InputError(
            "a row ends in padding, where no token follows: pad on the left, tokenizer.padding_side='left'"
        )
    if position_ids is not None:
        check_positions(position_ids, mask)
    return [tuple(ids[kept].tolist()) for ids, kept in zip(input_ids, mask, strict=True)]
