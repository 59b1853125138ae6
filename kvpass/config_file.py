"""A cache configuration as a JSON file: what ``kvpass tune`` writes, and ``--config`` reads."""

from __future__ import annotations

import json
from dataclasses import fields
from pathlib import Path
from typing import Any

from kvpass.config import CacheConfig
from kvpass.errors import ConfigError


def read_options(path: Path) -> dict[str, Any]:
    """The configuration in a file: a JSON object of some fields of :class:`~kvpass.CacheConfig`.

    Numbers of layers, which JSON can only write as text, become numbers.

    Raises:
        ConfigError: if the file holds none, or one that cannot be used.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ConfigError(f"the configuration {path} cannot be read as JSON: {error}") from error
    known = [field.name for field in fields(CacheConfig)]
    if not isinstance(content, dict) or not content.keys() <= set(known):
        raise ConfigError(f"{path} is no cache configuration: write a JSON object with fields of {', '.join(known)}")
    dtype = content.get("dtype")
    if isinstance(dtype, dict) and isinstance(dtype.get("layers"), dict):
        content["dtype"] = {**dtype, "layers": {_layer(key): form for key, form in dtype["layers"].items()}}
    CacheConfig(**content)
    return content


def check_place(path: Path) -> None:
    """Complain of a file that :func:`write_config` could not write, before there is anything to lose.

    Raises:
        ConfigError: naming the file.
    """
    if path.is_dir() or not path.parent.is_dir():
        raise ConfigError(f"the configuration {path} cannot be written: it must be a file in a folder that exists")


def write_config(path: Path, options: dict[str, Any]) -> None:
    """Write fields of a configuration, such as ``{"dtype": {"default": "int4", "layers": {0: "int8"}}}``.

    Raises:
        ConfigError: if the file cannot be written.
    """
    try:
        path.write_text(json.dumps(options, indent=2) + "\n", encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"the configuration {path} cannot be written: {error}") from error


def _layer(key: str) -> int | str:
    return int(key) if key.removeprefix("-").isdecimal() else key
