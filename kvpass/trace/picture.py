"""Occupancy, hit rate and queue of a replay over time, as a picture: ``pip install kvpass[plot]``."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from kvpass.errors import InputError
from kvpass.trace.replay import Replay

FORMATS = (".png", ".svg")
SIZE = (10.0, 8.0)  # inches
USED, CACHED, LINE, LIGHT = "#3b6ea8", "#a9c4e4", "#222222", "#d08a2e"


def check_picture(path: Path) -> None:
    """Find out early whether a picture can be written.

    Raises:
        InputError: if matplotlib is not there, or the name does not end as a picture's.
    """
    if path.suffix.lower() not in FORMATS:
        raise InputError(f"{path} is no name of a picture: let it end in {' or '.join(FORMATS)}")
    _figure_class()


def draw_replay(replay: Replay, path: Path, title: str) -> None:
    """Write the picture of a replay to ``path``, which ends in ``.png`` or ``.svg``.

    Raises:
        InputError: if it cannot be written.
    """
    check_picture(path)
    figure = _figure_class()(figsize=SIZE, layout="constrained")
    blocks, hits, queue = figure.subplots(3, 1, sharex=True)
    times = [moment.seconds for moment in replay.moments]
    used, cached = ([getattr(m, name) / replay.blocks for m in replay.moments] for name in ("used", "cached"))
    blocks.stackplot(times, used, cached, labels=["of running sequences", "kept for reuse"], colors=[USED, CACHED])
    blocks.set(title=title, ylabel="blocks of the pool", ylim=(0, 1))
    hits.plot(times, [m.hit_rate for m in replay.moments], color=CACHED, label="lately")
    hits.plot(times, [m.hit_rate_so_far for m in replay.moments], color=LINE, label="so far")
    hits.set(ylabel="hit rate by tokens", ylim=(0, 1))
    queue.plot(times, [m.running for m in replay.moments], color=USED, label="running")
    queue.plot(times, [m.waiting for m in replay.moments], color=LIGHT, label="waiting")
    queue.set(ylabel="sequences", xlabel="seconds of the trace", ylim=(0, None))
    for axes in (blocks, hits, queue):
        axes.legend(loc="center left", bbox_to_anchor=(1.0, 0.5), frameon=False)
        axes.spines[["top", "right"]].set_visible(False)
    try:
        figure.savefig(path, dpi=120)
    except OSError as error:
        raise InputError(f"the picture {path} cannot be written: {error}") from error


def _figure_class() -> Any:
    """matplotlib's figure, which needs neither a display nor its global state."""
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise InputError("matplotlib is not installed: pip install 'kvpass[plot]'") from error
    return Figure
