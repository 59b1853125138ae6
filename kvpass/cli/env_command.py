"""``kvpass env``: what kvpass finds here, for a report of a fault, and to see which kernels will serve."""

from __future__ import annotations

import json
from importlib.metadata import PackageNotFoundError, version
from typing import Annotated, Any

import typer

from kvpass.cli.terminal import line, output

PACKAGES = ("torch", "triton", "transformers", "tokenizers", "onnxruntime")


def env(as_json: Annotated[bool, typer.Option("--json", help="Print it as JSON.")] = False) -> None:
    """Print versions, devices, and which backends of the cache ops can serve here."""
    found = describe_environment()
    if as_json:
        typer.echo(json.dumps(found, indent=2))
        return
    for name, value in found.items():
        line(output(), f"{name}: {value}")


def describe_environment() -> dict[str, Any]:
    """Versions, devices and backends, by what a reader calls them."""
    import torch

    from kvpass.kernels.backends import BACKENDS, find
    from kvpass.quality.measure import describe_machine

    found = describe_machine()
    found |= {name: _version(name) for name in PACKAGES if name != "torch"}
    found["CUDA devices"] = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    for backend in BACKENDS:
        module, why = find(backend)
        serves = f"serves {', '.join(backend.devices) or 'every device'}"
        found[f"backend {backend.name}"] = serves if module is not None else f"does not serve: {why}"
    return found


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed"
