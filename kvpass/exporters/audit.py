"""The audit of an exported folder: that it is whole, is what its manifest says, and is right."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kvpass.errors import VerificationError
from kvpass.exporters.extras import require
from kvpass.exporters.manifest import PROBE_FILE, read_manifest
from kvpass.report import RewriteReport

AUDIT_SECONDS = 3600  # after which a process that runs a file is given up


@dataclass(frozen=True)
class AuditResult:
    """What an audit found right.

    Attributes:
        steps: steps that were run.
        rows: logits that were compared, each of one sequence after one step.
        error: largest difference of logits, as a part of the largest logit.
        bound: what was allowed; of a cache that rounds its rows, where most was.
    """

    steps: int
    rows: int
    error: float
    bound: float

    def __str__(self) -> str:
        found = f"largest difference {self.error:.1e} (bound {self.bound:.0e})"
        return f"{self.rows} rows of logits in {self.steps} steps, {found}"


def audit(folder: Path) -> AuditResult:
    """Audit an exported folder in a fresh process; nothing of it is run before its files are known to be unchanged.

    Raises:
        InputError: if the folder is no export, or not whole, or its runtime is not installed.
        VerificationError: if the file does not do what its manifest says.
    """
    from kvpass.exporters.formats import find_format

    manifest = read_manifest(folder)
    form = find_format(manifest["format"])
    require(form.name, form.needs)
    for check in form.checks:
        complaints = check(folder, manifest)
        if complaints:
            raise _wrong(folder, "; ".join(complaints))
    # A fresh process holds nothing of the one that exported: neither ops that happen to be registered, nor weights.
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-m", "kvpass.exporters.play_probe", str(folder)],
        capture_output=True, text=True, timeout=AUDIT_SECONDS, check=False,
    )  # fmt: skip
    lines = done.stdout.strip().splitlines()
    if done.returncode or not lines:
        raise _wrong(folder, f"it does not run: {' '.join(done.stderr.split())[-600:]}")
    return judge(folder, json.loads((folder / PROBE_FILE).read_text(encoding="utf-8")), json.loads(lines[-1]))


def judge(folder: Path, probe: Mapping[str, Any], answers: list[list[dict[str, Any]]]) -> AuditResult:
    """Hold what a file gave to what the model gave.

    Args:
        folder: for the message.
        probe: what was asked, with the model's answers.
        answers: for each step of the probe what the file gave for each row: its likeliest token, and its logits of the
            tokens that the model found likeliest.

    Raises:
        VerificationError: if a token or a logit differs.
    """
    worst, widest, rows = 0.0, probe["tolerance"], 0
    steps = [entry["rows"] for entry in probe["script"] if "rows" in entry]
    if [len(given) for given in answers] != [len(asked) for asked in steps]:
        raise _wrong(folder, "it did not answer every step")
    for number, (asked, given) in enumerate(zip(steps, answers, strict=True)):
        for row, answer in zip(asked, given, strict=True):
            # Twice: what the model's nudges did is a sample of what the file's roundings may do.
            bound = probe["tolerance"] + 2 * row.get("spread", 0.0)
            scale = max(row["scale"], 1e-6)
            errors = [abs(a - b) / scale for a, b in zip(row["logits"], answer["logits"], strict=True)]
            error = max(e if e == e else float("inf") for e in errors)
            where = f"sequence {row['sequence']} in step {number}"
            if not error <= bound:
                raise _wrong(folder, f"the logits of {where} differ by {error:.1e} of the largest (bound {bound:.0e})")
            margin = (row["logits"][0] - row["logits"][1]) / scale if len(row["logits"]) > 1 else 1.0
            if answer["token"] != row["top"][0] and margin > 2 * bound:
                raise _wrong(folder, f"{where} goes on with token {answer['token']} instead of {row['top'][0]}")
            worst, widest, rows = max(worst, error), max(widest, bound), rows + 1
    return AuditResult(len(steps), rows, worst, widest)


def _wrong(folder: Path, what: str) -> VerificationError:
    message = f"the export in {folder} is wrong: {what}. It must not be used"
    return VerificationError(message, RewriteReport())
