"""The example that lies beside an exported file: one text, put together of its runtime, its decoder and its usage."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

import torch

from kvpass.exporters.dialects.contracts import Port
from kvpass.types import CachePlan

DRIVERS = Path(__file__).parent / "drivers"
OWN = "kvpass.exporters"
# What C++ calls the dtypes of caches that a package can have.
SCALARS = {
    torch.float64: "Double",
    torch.float32: "Float",
    torch.float16: "Half",
    torch.bfloat16: "BFloat16",
    torch.float8_e4m3fn: "Float8_e4m3fn",
    torch.float8_e5m2: "Float8_e5m2",
    torch.int8: "Char",
    torch.uint8: "Byte",
}


def program_without_python(plan: CachePlan, ports: Sequence[Port]) -> str:
    """The text of ``run.cpp`` for a package of AOTInductor."""
    held = [port for port in ports if port.cache is not None]
    rows = [f"{{{port.shape[1]}, {port.shape[3]}, at::k{SCALARS[port.dtype]}}}" for port in held]
    text = (DRIVERS / "aoti_main.cpp").read_text(encoding="utf-8")
    values = {"BLOCK_SIZE": plan.block_size, "GROUPS": len(plan.group_windows), "CACHES": ", ".join(rows)}
    for name, value in values.items():
        text = text.replace(f"@{name}@", str(value))
    return text


def example_of(format: str, played: bool = False) -> str:
    """The text of ``run.py`` for a format; ``played``, of what an audit runs where that differs."""
    from kvpass.exporters.formats import find_format

    form = find_format(format)
    imports: set[str] = set()
    bodies: list[str] = []
    heading = ""
    for name in ((played and form.players) or form.drivers) + ("usage",):
        text = (DRIVERS / f"{name}.py").read_text(encoding="utf-8")
        words, _, rest = text.partition('"""\n')
        heading = heading or f'{words}"""\n'
        lines = rest.splitlines()
        imports |= {line for line in lines if re.match(r"(import|from) ", line) and OWN not in line}
        bodies.append("\n".join(line for line in lines if not re.match(r"(import|from) ", line)).strip())
    return f"{heading}\n" + "\n".join(sorted(imports)) + "\n\n\n" + "\n\n\n".join(bodies) + "\n"
