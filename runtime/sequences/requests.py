"""What a caller asks for, checked, as sequences."""

from __future__ import annotations

import math
import secrets
import time
from collections.abc import Sequence as Ordered

import numpy as np
from torch import Tensor

from kvpass.config import check_sampling
from kvpass.errors import ConfigError, InputError
from kvpass.runtime.prefix.prefix_nodes import TokenArray
from kvpass.runtime.sequences.output_text import Decode, OutputText
from kvpass.runtime.sequences.sequence import Sequence
from kvpass.types import CachePlan, Sampling

SEED_BITS = 64
MOST_PRIORITY = 100
MOST_SAMPLES = 4096  # of one prompt
SEED_STRIDE = 0x9E3779B97F4A7C15


def make_sequences(
    prompts: Ordered[Ordered[int]],
    max_new_tokens: int,
    sampling: Sampling | Ordered[Sampling],
    plan: CachePlan,
    eos_token_ids: tuple[int, ...],
    decode: Decode | None = None,
    samples: int = 1,
) -> list[Sequence]:
    """New sequences of each prompt, in order; of each the first has the seed of its sampling, the others follow it.

    Raises:
        InputError: if prompts, ``max_new_tokens`` or the numbers of samplings and ``samples`` cannot be used.
        ConfigError: if an option of a sampling cannot be used.
    """
    _check_prompts(prompts)
    new = _whole_number(max_new_tokens)
    if new is None or new < 1:
        raise InputError(f"max_new_tokens={max_new_tokens!r} is not a whole number of at least 1")
    each = _whole_number(samples)
    if each is None or each < 1:
        raise InputError(f"n={samples!r} is not a whole number of at least 1")
    if each > MOST_SAMPLES:
        raise InputError(f"n={samples} samples of a prompt are more than {MOST_SAMPLES}: ask for them in several calls")
    samplings = _samplings(sampling, len(prompts))
    sequences = []
    for index, (prompt, options) in enumerate(zip(prompts, samplings, strict=True)):
        tokens = _token_ids(prompt, f"prompts[{index}]", plan.vocab_size)
        _check_allowed(tokens, index, plan.forbidden_tokens)
        if len(tokens) < plan.prefix:
            raise InputError(
                f"prompts[{index}] has {len(tokens)} tokens; in this model the first {plan.prefix} tokens see one "
                f"another, so a prompt has to have at least {plan.prefix}"
            )
        if plan.max_length is not None and len(tokens) + new > plan.max_length:
            reason = f" ({plan.max_length_reason})" if plan.max_length_reason else ""
            raise InputError(
                f"prompts[{index}] has {len(tokens)} tokens; with max_new_tokens={new} that makes "
                f"{len(tokens) + new}, and the longest sequence is {plan.max_length}{reason}: shorten the prompt or "
                f"lower max_new_tokens"
            )
        seed = secrets.randbits(SEED_BITS) if options.seed is None else options.seed
        stop_ids = options.stop_token_ids if options.ignore_eos else (*options.stop_token_ids, *eos_token_ids)
        _check_for_model(options, plan.vocab_size, decode)
        leader: Sequence | None = None
        for sample in range(each):
            text = OutputText(tokens, decode, options.stop, options.include_stop) if options.stop and decode else None
            own = sample_seed(seed, sample)
            sequences.append(Sequence(tokens, new, options, own, stop_ids, plan.forbidden_tokens, text))
            sequences[-1].leader, sequences[-1].vocab_size = leader, plan.vocab_size
            leader = leader or sequences[-1]
    return sequences


def make_samples(
    prompt: Ordered[int],
    max_new_tokens: int,
    sampling: Sampling,
    count: int,
    plan: CachePlan,
    eos_token_ids: tuple[int, ...],
    decode: Decode | None = None,
) -> list[Sequence]:
    """``count`` new sequences of one prompt, as :func:`make_sequences` makes them of several.

    Raises:
        InputError: if prompt, ``max_new_tokens`` or ``count`` cannot be used.
        ConfigError: if ``sampling`` cannot be used.
    """
    if not isinstance(prompt, list | tuple | np.ndarray | Tensor | str | bytes):
        raise InputError(f"prompt is a {type(prompt).__name__}: give a list of token ids")
    if isinstance(prompt, list | tuple) and any(isinstance(part, list | tuple) for part in prompt):
        raise InputError("prompt is a list of lists: submit takes one prompt, a list of token ids; call it for each")
    if not isinstance(sampling, Sampling):
        raise ConfigError(f"sampling={sampling!r} is no kvpass.Sampling: submit takes one prompt and one of these")
    return make_sequences([prompt], max_new_tokens, sampling, plan, eos_token_ids, decode, count)


def set_service(
    sequences: Ordered[Sequence], priority: int, deadline: float | None, namespace: str, tenant: str
) -> None:
    """Say how new sequences are served; ``deadline`` is in seconds from now.

    Raises:
        InputError: if a value cannot be used.
    """
    whole = _whole_number(priority)
    if whole is None or not -MOST_PRIORITY <= whole <= MOST_PRIORITY:
        raise InputError(f"priority={priority!r} is not a whole number from {-MOST_PRIORITY} to {MOST_PRIORITY}")
    number = isinstance(deadline, int | float) and not isinstance(deadline, bool)
    if deadline is not None and not (number and 0 < deadline < math.inf):
        raise InputError(f"deadline={deadline!r} is not a number of seconds from now, more than 0, or None for no end")
    for name, value in (("namespace", namespace), ("tenant", tenant)):
        if not isinstance(value, str):
            raise InputError(f"{name}={value!r} is not a string")
    for sequence in sequences:
        sequence.priority = whole
        sequence.deadline = None if deadline is None else time.monotonic() + deadline
        sequence.namespace = namespace
        sequence.tenant = tenant


def sample_seed(seed: int, index: int) -> int:
    """The seed of the sample ``index`` of a request; of sample 0 the request's own.

    The others are far from it, so that requests with neighbouring seeds have no samples in common.
    """
    return (seed + index * SEED_STRIDE) % (1 << SEED_BITS) if index else seed


def _check_prompts(prompts: object) -> None:
    if not isinstance(prompts, list | tuple):
        what = "text" if isinstance(prompts, str | bytes) else type(prompts).__name__
        raise InputError(f"prompts is {what}: give a list of prompts, each a list of token ids")
    if not prompts:
        raise InputError("prompts is empty: give a list with at least one list of token ids")
    if _whole_number(prompts[0]) is not None:
        raise InputError("prompts is a flat list of token ids: wrap it, [prompt], to ask for one prompt")


def token_array(tokens: object, name: str, plan: CachePlan) -> TokenArray:
    """Token ids that a caller gave as ``name``, int32.

    Raises:
        InputError: if they are none of the model.
    """
    return np.array(_token_ids(tokens, name, plan.vocab_size), dtype=np.int32)


def _token_ids(prompt: object, where: str, vocab_size: int) -> list[int]:
    """The token ids of what is called ``where``, as plain integers within the vocabulary."""
    if isinstance(prompt, str | bytes):
        raise InputError(f"{where} is text: turn it into token ids with the model's tokenizer first")
    if isinstance(prompt, Tensor | np.ndarray):
        if prompt.ndim != 1:
            raise InputError(f"{where} has {prompt.ndim} dimensions: a prompt has one, its token ids")
        values = prompt.tolist()
    elif isinstance(prompt, list | tuple):
        values = list(prompt)
    else:
        raise InputError(f"{where} is a {type(prompt).__name__}: give a list of token ids")
    if not values:
        raise InputError(f"{where} is empty: a prompt needs at least one token, for example the beginning-of-text id")
    if not all(type(value) is int for value in values):
        values = [_token_id(value, f"{where}[{position}]") for position, value in enumerate(values)]
    if min(values) < 0 or max(values) >= vocab_size:
        position = next(i for i, value in enumerate(values) if not 0 <= value < vocab_size)
        raise InputError(
            f"{where}[{position}] is {values[position]}, which is no token id of this model: ids are 0 to "
            f"{vocab_size - 1}; check that the tokenizer belongs to the model"
        )
    return values


def _check_allowed(tokens: list[int], index: int, forbidden: tuple[int, ...]) -> None:
    for token in forbidden:
        if token in tokens:
            raise InputError(
                f"prompts[{index}][{tokens.index(token)}] is {token}, the padding token: the model treats sequences "
                f"that hold it in another way, and the rewrite is proven for those without it; prompts need no padding"
            )


def _token_id(value: object, where: str) -> int:
    token = _whole_number(value)
    if token is None:
        raise InputError(f"{where} is {value!r} of type {type(value).__name__}: token ids are whole numbers")
    return token


def _whole_number(value: object) -> int | None:
    """``value`` as an int if it is a Python or numpy integer; bools are none."""
    if isinstance(value, int | np.integer) and not isinstance(value, bool):
        return int(value)
    return None


def _samplings(sampling: Sampling | Ordered[Sampling], count: int) -> list[Sampling]:
    if isinstance(sampling, Sampling):
        _check_options(sampling)
        return [sampling] * count
    if not isinstance(sampling, list | tuple) or not all(isinstance(options, Sampling) for options in sampling):
        raise ConfigError(f"sampling={sampling!r} is neither a kvpass.Sampling nor a list of them")
    if len(sampling) != count:
        raise InputError(f"there are {count} prompts and {len(sampling)} samplings: give one for all, or one for each")
    for options in sampling:
        _check_options(options)
    return list(sampling)


def _check_for_model(options: Sampling, vocab_size: int, decode: Decode | None) -> None:
    """Check what a sampling asks of the model's vocabulary and of the engine's tokenizer."""
    for token in options.logit_bias:
        if not 0 <= token < vocab_size:
            raise ConfigError(f"logit_bias names {token}, which is no token id of this model: 0 to {vocab_size - 1}")
    if options.stop and decode is None:
        raise ConfigError(
            f"stop={options.stop!r} are strings, and the engine has no tokenizer to read its tokens with: give one, "
            f"kvpass.compile(model, tokenizer=...), or stop at tokens with stop_token_ids"
        )


def _check_options(options: Sampling) -> None:
    try:
        check_sampling(options)
    except TypeError as error:
        raise ConfigError(f"{options!r} has a value of the wrong type: {error}") from error
    if options.seed is not None and (isinstance(options.seed, bool) or not isinstance(options.seed, int)):
        raise ConfigError(f"seed={options.seed!r} must be a whole number, or None for a fresh one")
