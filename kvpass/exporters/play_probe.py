"""Plays a probe on an exported folder, and prints what it gave as JSON: ``python -m kvpass.exporters.play_probe DIR``.

It runs the very text that lies beside the file as an example, from the installed package; of a file for machines that
may not be there, it runs what the file was made of.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from kvpass.exporters.examples import example_of
from kvpass.exporters.manifest import MANIFEST_FILE, PROBE_FILE


def play(folder: Path) -> list[list[dict[str, Any]]]:
    """For each step of the probe and each of its rows the likeliest token, and the logits that the model was asked."""
    manifest = json.loads((folder / MANIFEST_FILE).read_text(encoding="utf-8"))
    probe = json.loads((folder / PROBE_FILE).read_text(encoding="utf-8"))
    place: dict[str, Any] = {"__name__": "an_exported_step", "__file__": str(folder / "run.py")}
    exec(compile(example_of(manifest["format"], played=True), "run.py", "exec"), place)
    return ask(place["Decoder"](folder), probe["script"])


def ask(decoder: Any, script: list[dict[str, Any]]) -> list[list[dict[str, Any]]]:
    """The same of a decoder that runs."""
    sequences = {number: decoder.start() for number in (0, 1)}
    answers = []
    for entry in script:
        if "end" in entry:
            decoder.end(sequences.pop(entry["end"]))
            continue
        if "start" in entry:
            other = (sequences[entry["from"]], entry["tokens"]) if "from" in entry else ()
            sequences[entry["start"]] = decoder.start(*other)
            continue
        rows = entry["rows"]
        logits = decoder.step([sequences[row["sequence"]] for row in rows], [row["tokens"] for row in rows])
        answers.append(
            [
                {"token": int(given.argmax()), "logits": [float(given[token]) for token in row["top"]]}
                for given, row in zip(logits, rows, strict=True)
            ]
        )
    return answers


if __name__ == "__main__":
    print(json.dumps(play(Path(sys.argv[1]))))
