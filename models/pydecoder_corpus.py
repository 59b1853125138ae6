"""The corpus of `pydecoder`: the Python standard library's own sources, split by file into training and held-out text.

Any Python installation has it: `sysconfig` says where. What is installed on top (site-packages) is left out. The split
and the order are functions of paths and contents alone, so the same Python version gives the same corpus.

Held out is a file when the hash of its path says so (`HELD_OUT_PERCENT`) and it is neither huge nor a near-copy: one
that shares more than `NEAR_COPY` of its long lines with other files goes to training. Then every training paragraph
that also stands in a held-out file is cut from the training text, so that no held-out paragraph was trained on.
"""

import hashlib
import re
import sysconfig
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

SKIPPED_FOLDERS = frozenset({"site-packages", "dist-packages", "__pycache__", "encodings"})
HELD_OUT_PERCENT = 3.0
HELD_OUT_LONGEST = 60_000  # characters; no single file may dominate the held-out figure
NEAR_COPY = 0.2
LONG_LINE = 30  # characters; shorter lines ("return self", "import os") are everyone's
LONG_PARAGRAPH = 60  # characters
PROSE_SHARE = 0.5  # tables of numbers and escapes have fewer letters and blanks than this


@dataclass(frozen=True)
class Corpus:
    """Texts of whole files, in the order of their paths."""

    train: tuple[str, ...]
    held_out: tuple[str, ...]


def read_stdlib() -> dict[str, str]:
    """Path inside the standard library to text, sorted by path; tables, copies and unreadable files are left out."""
    root = Path(sysconfig.get_path("stdlib"))
    texts: dict[str, str] = {}
    seen: set[str] = set()
    for path in sorted(root.rglob("*.py")):
        if SKIPPED_FOLDERS & set(path.relative_to(root).parts):
            continue
        try:
            text = path.read_text(encoding="utf-8")
        except UnicodeDecodeError:  # the tests of other source encodings
            continue
        plain = len(re.findall(r"[A-Za-z \n]", text))
        if len(text) < LONG_PARAGRAPH or plain < PROSE_SHARE * len(text) or text in seen:
            continue
        seen.add(text)
        texts[path.relative_to(root).as_posix()] = text
    return texts


def paragraphs(text: str) -> list[str]:
    """The text cut behind its blank lines; the pieces joined are the text."""
    return re.findall(r".*?(?:\n[ \t]*(?=\n)|\Z)", text, flags=re.DOTALL)


def _long_lines(text: str) -> set[str]:
    return {line.strip() for line in text.splitlines() if len(line.strip()) >= LONG_LINE}


def _draw(path: str) -> float:
    """A number in [0, 100) that depends on the path alone."""
    return int.from_bytes(hashlib.sha256(path.encode()).digest()[:4]) / 2**32 * 100


def split(texts: dict[str, str]) -> Corpus:
    """Split by file, then cut from the training text every long paragraph that is also held out."""
    candidates = {p for p, text in texts.items() if len(text) <= HELD_OUT_LONGEST and _draw(p) < HELD_OUT_PERCENT}
    num_files = Counter(line for text in texts.values() for line in _long_lines(text))
    held_out = []
    for path in sorted(candidates):
        lines = _long_lines(texts[path])
        if lines and sum(num_files[line] > 1 for line in lines) <= NEAR_COPY * len(lines):
            held_out.append(path)
    secret = {p.strip() for path in held_out for p in paragraphs(texts[path]) if len(p.strip()) >= LONG_PARAGRAPH}
    train = []
    for path in texts.keys() - set(held_out):
        kept = "".join(p for p in paragraphs(texts[path]) if p.strip() not in secret)
        if kept.strip():
            train.append((path, kept))
    return Corpus(train=tuple(text for _, text in sorted(train)), held_out=tuple(texts[path] for path in held_out))


def build_corpus() -> Corpus:
    """The standard library of the running Python, split."""
    return split(read_stdlib())
