"""`docs/coverage.md` out of the figures of `coverage.py`."""

from __future__ import annotations

from collections import Counter
from typing import Any

Row = dict[str, Any]


def as_expected(row: Row) -> bool:
    """Softmax attention alone is right, everything else is refused."""
    return bool(row["status"] == ("right" if row["kind"] == "attention" else "refused"))


def page(content: Row) -> str:
    """`docs/coverage.md`, of the content of `coverage.json`."""
    rows, machine, bound = content["results"], content["machine"], content["options"]["bound"]
    revisions = Counter(row["revision"] for row in rows)
    families: dict[str, list[Row]] = {}
    for row in rows:
        families.setdefault(row["family"], []).append(row)
    lines = [
        "# Coverage",
        "",
        "What `kvpass.compile` makes of the families of transformers that are causal and build tiny, each with random",
        "weights, with sdpa and with eager attention where it has both. This page is written by",
        "`python benchmarks/coverage.py`; [the figures](../benchmarks/results/coverage.json) have more.",
        "",
        "*Right*: the greedy tokens are those of a naive loop over the original (float32, ragged prompts, two of",
        f"which share a prefix, cold and with cached prefixes), and logits are within {bound:.0e} of the largest; the",
        "weights are drawn such that a broken cache would show. *Refused*: nothing was rewritten, and the reason",
        "stands below.",
        "",
        f"{machine['processor']}, {machine['cores']} cores, one thread, Python {machine['python']}, torch "
        f"{machine['torch']}, transformers {machine['transformers']}, {content['date']}.",
        "",
        "Commits: " + ", ".join(f"{name} ({count} rows)" for name, count in revisions.most_common()) + ".",
        "",
        "| what mixes tokens | families | right | refused | wrong | crashed | blind |",
        "| --- | --- | --- | --- | --- | --- | --- |",
    ]
    for kind, what in WHAT.items():
        of_kind = [group for group in families.values() if group[0]["kind"] == kind]
        worst = Counter(max((row["status"] for row in group), key=STATUSES.index) for group in of_kind)
        lines.append(f"| {what} | {len(of_kind)} | " + " | ".join(str(worst[s]) for s in STATUSES) + " |")
    missing = [name for name in content["families"] if name not in families]
    lines += ["", f"Not examined yet: {', '.join(missing)}."] if missing else []
    lines += ["", "## Family by family", ""]
    lines += [
        "Processor seconds of torch.export, of everything between it and the rewritten graph, and of verification.",
        "",
    ]
    lines += ["| family | attention | result | logits within | B/token | export | passes | verify |"]
    lines += ["| --- | --- | --- | --- | --- | --- | --- | --- |"]
    lines += [_line(row) for row in rows]
    refused = [row for row in rows if row["why"]]
    lines += ["", "## Reasons", "", "| family | attention | reason |", "| --- | --- | --- |"]
    lines += [f"| {r['family']} | {_used(r)} | {_reasons(r)} |" for r in refused]
    return "\n".join(lines) + "\n"


STATUSES = ("right", "refused", "wrong", "crashed", "blind")
WHAT = {
    "attention": "softmax attention alone",
    "hybrid": "convolutions or recurrences as well",
    "selects": "keys chosen by data",
}


def _used(row: Row) -> str:
    return str(row.get("used") or row["attention"])


def _line(row: Row) -> str:
    seconds = row.get("seconds", {})
    passes = sum(value for name, value in seconds.items() if name not in ("export", "verify"))
    times = [seconds.get("export"), passes if seconds else None, seconds.get("verify")]
    shown = ["" if value is None else f"{value:.1f}" for value in times]
    error = f"{row['logits_error']:.0e}" if "logits_error" in row else ""
    status = row["status"] if as_expected(row) else f"**{row['status']}**"
    cells = [row["family"], _used(row), status, error, str(row.get("bytes_per_token", "")), *shown]
    return f"| {' | '.join(cells)} |"


def _reasons(row: Row) -> str:
    reasons = [reason.replace("|", "\\|").replace("\n", " ") for reason in row["why"]]
    more = len(reasons) - 2
    return "; ".join(reasons[:2]) + (f"; and {more} more" if more > 0 else "")
