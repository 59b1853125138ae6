"""The manifest of an exported folder: what made it, what it takes and gives, its limits, and a digest of each file."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from kvpass.errors import InputError
from kvpass.exporters.dialects.contracts import Port
from kvpass.types import CachePlan, CacheSpec

MANIFEST_FILE, PROBE_FILE = "manifest.json", "probe.json"
LAYOUT = 1  # of the manifest
RUNTIMES = ("torch", "onnx", "onnxruntime", "onnxruntime-genai", "tensorrt-rtx")


def make_manifest(
    format: str,
    fingerprint: str,
    plan: CachePlan,
    inputs: Sequence[Port],
    outputs: Sequence[Port],
    context: int | None,
    report: Mapping[str, Any],
    how_to_step: str,
) -> dict[str, Any]:
    """A manifest as plain data, without the digests of the files."""
    return {
        "manifest": LAYOUT,
        "kvpass": version("kvpass"),
        "format": format,
        "versions": {name: found for name in RUNTIMES if (found := installed(name)) is not None},
        "weights": fingerprint,
        "how_to_step": how_to_step,
        "inputs": [_port(port) for port in inputs],
        "outputs": [_port(port) for port in outputs],
        "cache": {
            "block_size": plan.block_size,
            "groups": len(plan.group_windows),
            "context": context,
            "caches": [_spec(spec) for spec in plan.caches],
        },
        "limits": {
            "max_length": plan.max_length,
            "reason": plan.max_length_reason,
            "vocab_size": plan.vocab_size,
            "forbidden_tokens": list(plan.forbidden_tokens),
        },
        "report": dict(report),
    }


def write_manifest(folder: Path, manifest: Mapping[str, Any]) -> None:
    """Write the manifest with the digests of all files that lie in the folder."""
    found = sorted(path for path in folder.iterdir() if path.name != MANIFEST_FILE)
    files = {path.name: {"bytes": path.stat().st_size, "sha256": digest_of(path)} for path in found}
    text = json.dumps({**manifest, "files": files}, indent=2)
    (folder / MANIFEST_FILE).write_text(text + "\n", encoding="utf-8")


def read_manifest(folder: Path) -> dict[str, Any]:
    """The manifest of a folder whose files are those that were written.

    Raises:
        InputError: if there is none, it is of another version of kvpass, or a file is missing, cut short or changed.
    """
    place = folder / MANIFEST_FILE
    try:
        manifest = json.loads(place.read_text(encoding="utf-8"))
        made_by, files = manifest["kvpass"], manifest["files"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise InputError(f"{folder} holds no export of kvpass that can be read: {MANIFEST_FILE}: {error}") from error
    if manifest.get("manifest") != LAYOUT or made_by != version("kvpass"):
        raise InputError(f"{folder} was exported by kvpass {made_by}, and this is {version('kvpass')}: export it again")
    for name, said in files.items():
        path = folder / name
        if Path(name).name != name or not path.is_file():
            raise InputError(f"{folder} has no file {name}: export the model again")
        size = path.stat().st_size
        if size != said["bytes"]:
            raise InputError(f"{path} has {size} bytes instead of {said['bytes']}: it was cut short or changed")
        if digest_of(path) != said["sha256"]:
            raise InputError(f"{path} was changed since it was exported: export the model again")
    assert isinstance(manifest, dict)
    return manifest


def digest_of(path: Path) -> str:
    """The SHA-256 of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def installed(name: str) -> str | None:
    """The version of a package; None where it is not installed."""
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def _port(port: Port) -> dict[str, Any]:
    return {**port.to_dict(), "is_cache": port.cache is not None}


def _spec(spec: CacheSpec) -> dict[str, Any]:
    return {
        "name": spec.name,
        "heads": spec.num_kv_heads,
        "key_dim": spec.key_dim,
        "value_dim": spec.value_dim,
        "key_format": spec.key_format,
        "value_format": spec.value_format,
        "window": spec.window,
        "sites": list(spec.sites),
    }
