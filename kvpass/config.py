"""Options of the cache and the checks that they are usable."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from os import PathLike, fspath
from typing import Any

import torch

from kvpass.errors import ConfigError
from kvpass.types import AttentionSinks, HeavyHitters, Sampling, dtype_name

BYTE_UNITS = {"": 1, "B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12}
BYTE_UNITS |= {"KIB": 2**10, "MIB": 2**20, "GIB": 2**30, "TIB": 2**40}
CACHE_DTYPES = ("auto", "float32", "bfloat16", "float16", "fp8_e4m3", "fp8_e5m2", "int8", "int4", "k4v2")
# Other names of formats that people know; a torch.dtype stands for its name.
DTYPE_ALIASES = {"bf16": "bfloat16", "fp16": "float16", "fp32": "float32", "fp8": "fp8_e4m3"} | {
    "float8_e4m3fn": "fp8_e4m3", "float8_e5m2": "fp8_e5m2"
}  # fmt: skip
DEFAULT_MEMORY = "1GiB"
EVICTION_POLICIES = ("lru", "lfu", "fifo", "cost")
# Host memory that blocks pass through on their way to and from disk, where none was asked for.
DEFAULT_STAGING = "256MiB"
LEAST_SETTLING_BLOCK = 16  # tokens: those whose keys k4v2 quantises together
_SAMPLING_NUMBERS = (
    "temperature",
    "top_p",
    "min_p",
    "repetition_penalty",
    "presence_penalty",
    "frequency_penalty",
)


def parse_bytes(text: str | int | float, name: str = "memory") -> int:
    """Number of bytes in ``"512MiB"``, ``"1.5GB"`` or ``4096``.

    Raises:
        ConfigError: if the text is no positive amount with a known unit; it is called ``name`` there.
    """
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([a-zA-Z]*)\s*", str(text))
    size = 0 if match is None else int(float(match[1]) * BYTE_UNITS.get(match[2].upper(), 0))
    if size < 1 or isinstance(text, float | bool):
        raise ConfigError(f"{name}={text!r} is not an amount of memory: write for example '512MiB' or '2GiB'")
    return size


def parse_share(memory: object) -> float | None:
    """The share of a device's memory that ``0.9`` or ``"90%"`` means; None where ``memory`` is an amount.

    Raises:
        ConfigError: if it is a share that is not above 0 and at most 1.
    """
    percent = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*%\s*", memory) if isinstance(memory, str) else None
    if percent is None and not isinstance(memory, float):
        return None
    share = float(percent[1]) / 100 if percent is not None else float(memory)  # type: ignore[arg-type]
    if not 0 < share <= 1:
        raise ConfigError(f"memory={memory!r} is no share of the device's memory: write for example 0.9 or '90%'")
    return share


@dataclass(frozen=True)
class CacheConfig:
    """How the cache is stored and how much of it there is.

    Attributes:
        dtype: format of keys and values; ``"auto"`` keeps the dtype that the model computes them in. Or a dict: of
            ``"key"`` and ``"value"`` for two formats, or of ``"default"`` (a format, or two) and ``"layers"``, which
            maps the number of an attention in the model (from 0, or from -1 backwards) to its format or two. The
            formats are those of :data:`CACHE_DTYPES`, or a ``torch.dtype``; what is lossy is measured by the
            verification.
        block_size: tokens per block, a power of two.
        memory: bytes for all caches together, such as ``"1GiB"``, or a share of what is free on the device when the
            engine is made, such as ``0.9`` or ``"90%"``; excludes ``num_blocks``. When neither is given, 1 GiB.
        num_blocks: number of blocks, instead of ``memory``.
        prefix_sharing: reuse blocks of equal prefixes, within a batch and across calls.
        max_batch_tokens: tokens computed in one step, prefill and decode together; longer prompts are cut in chunks.
        max_sequences: sequences that run at once; more are queued.
        recompute: store whatever is narrowest, such as the hidden state, even where an attention over it costs more
            than the bytes saved; what follows from it is computed again at every step.
        fold_rotations: rotations around int4 and k4v2 caches are part of the weights where the graph allows it, which
            then are copies: a later change of the model's own does not count there. False keeps them in every step.
        max_length: longest sequence that will be asked for. Needed only where a bias has to be tabulated, or a mask
            could not be proven for every length; by default the model's own limit, or 2048.
        eviction: which cached blocks make room first: of :data:`EVICTION_POLICIES`, those released longest ago, taken
            over least often, registered first, or cheapest to compute again for their use.
        scrub: overwrite blocks with zeros as soon as nobody owns them and their content is not kept for reuse.
        host_memory: bytes of host memory, such as ``"4GiB"``: half of it for evicted blocks, which come back when their
            prefix is asked for again, and half for the blocks of preempted sequences. None keeps nothing there.
        disk: a folder for what host memory has no room for. It is found again by later engines of the same model and
            the same configuration of the cache.
        disk_memory: most bytes on disk.
        forgetting: what long sequences forget, such as ``kvpass.AttentionSinks(window=1024)`` or
            ``kvpass.HeavyHitters(recent=512, heavy=512)``: lossy, off by default. Prefixes are not shared then.

    Raises:
        ConfigError: on construction, for values that cannot be used.
    """

    dtype: str | torch.dtype | Mapping[str, Any] = "auto"
    block_size: int = 32
    memory: str | int | float | None = None
    num_blocks: int | None = None
    prefix_sharing: bool = True
    max_batch_tokens: int = 2048
    max_sequences: int = 256
    recompute: bool = False
    fold_rotations: bool = True
    max_length: int | None = None
    eviction: str = "lru"
    scrub: bool = False
    host_memory: str | int | None = None
    disk: str | PathLike[str] | None = None
    disk_memory: str | int = "10GiB"
    forgetting: AttentionSinks | HeavyHitters | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "dtype", _without_aliases(self.dtype))
        _check_dtype(self.dtype)
        size = self.block_size
        if not _is_count(size) or size & (size - 1):
            raise ConfigError(f"block_size={size!r} is not a power of two: choose for example 16, 32 or 64")
        if size < LEAST_SETTLING_BLOCK and "k4v2" in _named(self.dtype):
            raise ConfigError(f"block_size={size}: dtype k4v2 needs blocks of at least 16 tokens, choose 16, 32 or 64")
        if self.memory is not None and self.num_blocks is not None:
            raise ConfigError("memory and num_blocks both say how large the cache is: give one of them")
        if self.memory is not None and parse_share(self.memory) is None:
            parse_bytes(self.memory)
        self._check_tiers()
        for name in ("num_blocks", "max_batch_tokens", "max_sequences", "max_length"):
            value = getattr(self, name)
            if value is None and name in ("num_blocks", "max_length"):
                continue
            if not _is_count(value):
                raise ConfigError(f"{name}={value!r} is not a whole number of at least 1")
        if not isinstance(self.fold_rotations, bool):
            raise ConfigError(f"fold_rotations={self.fold_rotations!r} is neither True nor False")
        self._check_forgetting()

    def _check_tiers(self) -> None:
        if self.eviction not in EVICTION_POLICIES:
            raise ConfigError(f"eviction={self.eviction!r} is unknown: choose one of {', '.join(EVICTION_POLICIES)}")
        if not isinstance(self.scrub, bool):
            raise ConfigError(f"scrub={self.scrub!r} is neither True nor False")
        if self.disk is not None and (not isinstance(self.disk, str | PathLike) or not fspath(self.disk)):
            raise ConfigError(f"disk={self.disk!r} is no path of a folder")
        if (self.host_memory is not None or self.disk is not None) and not self.prefix_sharing:
            raise ConfigError("host_memory and disk keep registered prefixes: leave them out, or prefix_sharing on")
        if self.host_memory is not None:
            parse_bytes(self.host_memory, "host_memory")
        parse_bytes(self.disk_memory, "disk_memory")

    def _check_forgetting(self) -> None:
        forgetting = self.forgetting
        if forgetting is None:
            return
        if not isinstance(forgetting, AttentionSinks | HeavyHitters):
            raise ConfigError(
                f"forgetting={forgetting!r} is no way to forget tokens: give kvpass.AttentionSinks(window=1024) or "
                "kvpass.HeavyHitters(recent=512, heavy=512)"
            )
        for name, value in vars(forgetting).items():
            if not _is_count(value) and not (name == "every" and value is None):
                kind = type(forgetting).__name__
                raise ConfigError(f"{name}={value!r} of kvpass.{kind} is no whole number of at least 1")
        if self.host_memory is not None or self.disk is not None:
            raise ConfigError("sequences that forget share no prefixes: leave host_memory and disk out")
        if "k4v2" in _named(self.dtype):
            raise ConfigError(
                "dtype k4v2 tells the newest blocks by their place, which forgetting changes: choose int4"
            )

    def formats(self, attentions: int) -> tuple[tuple[str, str], ...]:
        """Formats of keys and values that ``dtype`` asks for, for each of so many attentions; may be ``"auto"``.

        Raises:
            ConfigError: if ``dtype`` names an attention that the model does not have, or one twice.
        """
        per_layer = isinstance(self.dtype, Mapping) and not set(self.dtype) <= {"key", "value"}
        chosen = [_pair(self.dtype["default"] if per_layer else self.dtype)] * attentions  # type: ignore[index]
        named: set[int] = set()
        for layer, choice in self.dtype.get("layers", {}).items() if isinstance(self.dtype, Mapping) else ():
            if not -attentions <= layer < attentions:
                raise ConfigError(f"dtype names the layer {layer}, but the model has {attentions} attentions")
            if layer % attentions in named:
                raise ConfigError(f"dtype names the layer {layer % attentions} twice, from either end: name it once")
            named.add(layer % attentions)
            chosen[layer] = _pair(choice)
        return tuple(chosen)

    @property
    def host_bytes(self) -> int:
        """Bytes of host memory for blocks that leave the device; 0 for none."""
        if self.host_memory is None:
            return 0 if self.disk is None else parse_bytes(DEFAULT_STAGING)
        return parse_bytes(self.host_memory)

    @property
    def memory_share(self) -> float | None:
        """The share of what is free on the device, if ``memory`` is one."""
        return parse_share(self.memory)

    @property
    def memory_bytes(self) -> int:
        """Bytes for all caches together; meaningful when ``num_blocks`` and ``memory_share`` are None."""
        return parse_bytes(DEFAULT_MEMORY if self.memory is None else self.memory)


def _without_aliases(dtype: Any) -> Any:
    if isinstance(dtype, Mapping):
        return {key: _without_aliases(choice) for key, choice in dtype.items()}
    name = dtype_name(dtype) if isinstance(dtype, torch.dtype) else dtype
    return DTYPE_ALIASES.get(name, name) if isinstance(name, str) else name


def _check_dtype(dtype: Any) -> None:
    if not isinstance(dtype, Mapping) or set(dtype) <= {"key", "value"}:
        _check_choice("dtype", dtype)
        return
    if "default" not in dtype or not set(dtype) <= {"default", "layers"}:
        raise ConfigError(
            f"dtype={dict(dtype)!r} has the entries {', '.join(map(repr, dtype))}: a dict has 'key' and 'value', or "
            "'default' and, if some layers differ, 'layers'"
        )
    layers = dtype.get("layers", {})
    if not isinstance(layers, Mapping) or not all(type(layer) is int for layer in layers):
        raise ConfigError(f"dtype['layers']={layers!r} does not map numbers of layers to formats")
    _check_choice("dtype['default']", dtype["default"])
    for layer, choice in layers.items():
        _check_choice(f"dtype['layers'][{layer}]", choice)


def _check_choice(where: str, choice: Any) -> None:
    """Raise unless ``choice`` is the name of a format, or a dict of one for keys and one for values."""
    if isinstance(choice, Mapping):
        if set(choice) != {"key", "value"}:
            raise ConfigError(f"{where}={dict(choice)!r} must have a format for 'key' and one for 'value'")
        for part in ("key", "value"):
            if choice[part] == "k4v2":
                raise ConfigError(f"{where}[{part!r}]='k4v2' is a format of keys and values together: name it for both")
            _check_choice(f"{where}[{part!r}]", choice[part])
    elif not isinstance(choice, str) or choice not in CACHE_DTYPES:
        raise ConfigError(f"{where}={choice!r} is not a cache dtype: choose one of {', '.join(CACHE_DTYPES)}")


def _pair(choice: Any) -> tuple[str, str]:
    """Formats of keys and values of a choice that was checked."""
    if isinstance(choice, Mapping):
        return choice["key"], choice["value"]
    return ("k4", "v2") if choice == "k4v2" else (choice, choice)


def _named(dtype: Any) -> list[Any]:
    """All formats that a checked ``dtype`` names."""
    if not isinstance(dtype, Mapping):
        return [dtype]
    return [name for choice in dtype.values() for name in _named(choice)]


def check_sampling(sampling: Sampling) -> None:
    """Raise :class:`ConfigError` if an option of ``sampling`` cannot be used."""
    for name in _SAMPLING_NUMBERS:
        if not _is_number(getattr(sampling, name)):
            raise ConfigError(f"{name}={getattr(sampling, name)!r} is not a number")
    if sampling.seed is not None and (isinstance(sampling.seed, bool) or not isinstance(sampling.seed, int)):
        raise ConfigError(f"seed={sampling.seed!r} is not a whole number")
    if not sampling.temperature >= 0 or sampling.temperature == float("inf"):
        raise ConfigError(f"temperature={sampling.temperature!r} must be 0 (greedy) or a positive number")
    if not 0 < sampling.top_p <= 1:
        raise ConfigError(f"top_p={sampling.top_p!r} must lie in (0, 1]")
    if not 0 <= sampling.min_p <= 1:
        raise ConfigError(f"min_p={sampling.min_p!r} must lie in [0, 1]")
    if sampling.top_k not in (0, -1) and not _is_count(sampling.top_k):
        raise ConfigError(f"top_k={sampling.top_k!r} must be 0 or -1 (all tokens) or a whole number of at least 1")
    if any(isinstance(token, bool) or not isinstance(token, int) for token in sampling.stop_token_ids):
        raise ConfigError(f"stop_token_ids={sampling.stop_token_ids!r} must be token ids (whole numbers)")
    _check_logit_options(sampling)
    _check_outputs(sampling)


def _check_logit_options(sampling: Sampling) -> None:
    """Penalties, bias and the callback."""
    if not 0 < sampling.repetition_penalty < math.inf:
        raise ConfigError(
            f"repetition_penalty={sampling.repetition_penalty!r} must be a positive number: 1 is off, more than 1 "
            f"discourages repetition"
        )
    for name in ("presence_penalty", "frequency_penalty"):
        if not math.isfinite(getattr(sampling, name)):
            raise ConfigError(f"{name}={getattr(sampling, name)!r} must be finite: 0 is off")
    if not isinstance(sampling.logit_bias, Mapping):
        raise ConfigError(f"logit_bias={sampling.logit_bias!r} must map token ids to what is added to their logits")
    for token, bias in sampling.logit_bias.items():
        if isinstance(token, bool) or not isinstance(token, int):
            raise ConfigError(f"logit_bias names {token!r}, which is no token id (a whole number)")
        if not _is_number(bias) or not bias < math.inf:
            raise ConfigError(f"logit_bias adds {bias!r} to token {token}: permitted are finite numbers, and -inf")
    if sampling.allowed_tokens is not None and not callable(sampling.allowed_tokens):
        raise ConfigError(
            f"allowed_tokens={sampling.allowed_tokens!r} must be a function from the tokens generated so far to those "
            f"that may come next"
        )


def _check_outputs(sampling: Sampling) -> None:
    """What is reported, and stop strings."""
    if sampling.logprobs is not None and sampling.logprobs != 0 and not _is_count(sampling.logprobs):
        raise ConfigError(
            f"logprobs={sampling.logprobs!r} must be None, or how many likeliest tokens to report beside the chosen one"
        )
    stops = sampling.stop
    if not isinstance(stops, tuple | list) or not all(isinstance(text, str) and text for text in stops):
        raise ConfigError(f"stop={stops!r} must be a tuple of strings that are not empty, such as stop=('END',)")


def _is_number(value: object) -> bool:
    """Whether it is an int or float, other than a bool, NaN, or an int beyond all floats."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return False
    return not math.isnan(value) if isinstance(value, float) else abs(value) < 2**1000


def _is_count(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 1
