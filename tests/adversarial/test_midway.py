"""Weights changed while requests run or blocks are kept elsewhere: what comes is the new model's, or an error."""

import contextlib
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

import kvpass
from tests.adversarial import midway

pytestmark = pytest.mark.slow  # found once, mended once


def wrong(scene: Callable[[], Iterator[str]]) -> list[str]:
    """What the scene finds wrong; nothing where it ends in an error of kvpass."""
    found: list[str] = []
    with contextlib.suppress(kvpass.KvpassError):
        found.extend(scene())
    return found


def test_in_mid_stream() -> None:
    assert wrong(midway.in_mid_stream) == []


def test_while_another_waits() -> None:
    assert wrong(midway.with_samples) == []


def test_behind_a_prefix() -> None:
    assert wrong(midway.behind_a_prefix) == []


def test_behind_a_prefix_on_the_host() -> None:
    assert wrong(lambda: midway.behind_a_prefix(host_memory="8MiB")) == []


def test_behind_a_prefix_on_disk(tmp_path: Path) -> None:
    assert wrong(lambda: midway.behind_a_prefix(disk=tmp_path, disk_memory="16MiB")) == []


@pytest.mark.sampled(2)
@pytest.mark.parametrize("changes", [True, False])
def test_for_a_later_engine(tmp_path: Path, changes: bool) -> None:
    assert wrong(lambda: midway.for_a_later_engine(tmp_path, changes)) == []


@pytest.mark.parametrize("draft", [None, "lookup"])
def test_unchanged_is_right(draft: str | None) -> None:
    """The scenes are not wrong by themselves."""
    model = midway.separate()()
    engine = kvpass.compile(model, midway.config(), draft=kvpass.PromptLookup() if draft else None)
    for _ in range(2):
        out, logprobs = midway.served(engine, midway.ordinary(20), 4)
        assert midway.wrong_steps(model, midway.ordinary(20), out, logprobs) == []
