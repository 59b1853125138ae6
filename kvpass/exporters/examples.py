"""The example that lies beside an exported file: one text, put together of its runtime, its decoder and its usage."""

from __future__ import annotations

import re
from pathlib import Path

DRIVERS = Path(__file__).parent / "drivers"
OWN = "kvpass.exporters"


def example_of(format: str) -> str:
    """The text of ``run.py`` for a format."""
    from kvpass.exporters.formats import find_format

    form = find_format(format)
    imports: set[str] = set()
    bodies: list[str] = []
    heading = ""
    for name in (*form.drivers, "usage"):
        text = (DRIVERS / f"{name}.py").read_text(encoding="utf-8")
        words, _, rest = text.partition('"""\n')
        heading = heading or f'{words}"""\n'
        lines = rest.splitlines()
        imports |= {line for line in lines if re.match(r"(import|from) ", line) and OWN not in line}
        bodies.append("\n".join(line for line in lines if not re.match(r"(import|from) ", line)).strip())
    return f"{heading}\n" + "\n".join(sorted(imports)) + "\n\n\n" + "\n\n\n".join(bodies) + "\n"
