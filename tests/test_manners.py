"""What a compile tells of itself: one line of log for each decision, and a table in a notebook."""

import io
import logging
import sys
import threading
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext

import pytest
import torch
from rich.console import Console
from torch import nn

import kvpass
from kvpass.fx_passes.capture.quiet_export import quiet_export
from kvpass.progress import STAGES, compile_progress, silent
from tests.parity.compiled import engine_of, original_of


@contextmanager
def lines_of_log() -> Iterator[list[str]]:
    lines: list[str] = []

    class Kept(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            lines.append(record.getMessage())

    logger, handler = logging.getLogger("kvpass"), Kept()
    level = logger.level
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    try:
        yield lines
    finally:
        logger.removeHandler(handler)
        logger.setLevel(level)


class RunningMean(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x.cumsum(1) / torch.arange(1, x.shape[1] + 1)[:, None]


def test_each_decision_is_a_line_of_log() -> None:
    engine_of.cache_clear()
    with lines_of_log() as lines:
        report = engine_of("einsum, tril of ones").report
    assert [line.split(":")[0] for line in lines[: len(report.sites)]] == [site.name for site in report.sites]
    assert report.verification is not None and set(report.verification.checks) <= set(lines)
    assert lines[-1].startswith("compiled in ")


def test_each_refusal_is_a_line_of_log() -> None:
    model = nn.Sequential(nn.Embedding(40, 8), RunningMean(), nn.Linear(8, 40)).eval()
    with lines_of_log() as lines, pytest.raises(kvpass.RefusedError):
        kvpass.compile(model)
    assert any(line.startswith("refused by prove-token-axis: ") for line in lines)


def test_a_notebook_shows_the_table() -> None:
    shown = engine_of("einsum, tril of ones").report._repr_html_()
    assert shown.startswith("<pre") and "attention sites" in shown and "verified decode" in shown


def test_a_long_compile_shows_on_a_terminal_what_it_does() -> None:
    shown = io.StringIO()
    console = Console(file=shown, force_terminal=True, width=80)
    with compile_progress(console, patience=0.0) as begin:
        for stage in STAGES:
            begin(stage)
            time.sleep(0.3)
    assert all(stage in shown.getvalue() for stage in ("proof", "verification"))
    for quiet in (Console(file=shown), console):
        shown.truncate(0)
        with silent() if quiet is console else nullcontext(), compile_progress(quiet, patience=0.0) as begin:
            begin("proof")
            time.sleep(0.2)
        assert not shown.getvalue()
    with pytest.raises(KeyboardInterrupt), compile_progress(console, patience=0.05):
        time.sleep(0.2)
        raise KeyboardInterrupt
    threads = [thread for thread in threading.enumerate() if isinstance(thread, threading.Timer)]
    assert not threads


class Branches(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed, self.head = nn.Embedding(9, 4), nn.Linear(4, 9)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        x = self.embed(ids)
        if x.sum() > 0:
            print("a line of the model's own", file=sys.stderr)
        return self.head(x)


def test_a_refused_capture_prints_no_graph(capfd: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(kvpass.RefusedError):
        kvpass.compile(Branches().eval())
    assert "def forward" not in capfd.readouterr().err
    with quiet_export():
        torch.manual_seed(0)
        model = Branches().eval()
        for token in range(9):
            model(torch.tensor([[token]]))
    assert "a line of the model's own" in capfd.readouterr().err


@pytest.mark.slow
def test_no_warning_of_torch_comes_of_a_compile_and_an_engine_has_a_name() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error", FutureWarning)
        engine = kvpass.compile(original_of("einsum, tril of ones"), kvpass.CacheConfig(num_blocks=16))
    assert repr(engine) == "<kvpass.Engine: 2 attentions, 0 of 16 blocks in use>"
    engine.close()
    assert repr(engine).endswith("closed>")
