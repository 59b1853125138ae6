"""A forward that reads a length as text is refused; one that tells of it is not."""

import logging
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

import kvpass
from tests.fx_passes.validation.test_compare_capture import CONFIG, Watchful

READ: dict[str, Callable[[Tensor], object]] = {
    "str": lambda ids: str(ids.shape[1]),
    "f-string": lambda ids: f"{ids.shape[1]}",
    "shape": lambda ids: repr(ids.shape),
    "list of sizes": lambda ids: str([*ids.shape]),
    "join": lambda ids: "x".join(map(str, ids.shape)),
}


@pytest.mark.parametrize("name", READ)
def test_read(name: str) -> None:
    with pytest.raises(kvpass.RefusedError, match=r"into text \(test_length_as_text.py, line \d+\)"):
        kvpass.compile(Watchful(lambda ids: 8 if "00" in str(READ[name](ids)) else 1000).eval(), CONFIG)


def test_told() -> None:
    def window(ids: Tensor) -> int:
        logging.getLogger("decoder").warning("%s tokens", ids.shape[1])
        assert ids.shape[1] > 0, f"{ids.shape} is empty"
        torch._check(ids.shape[1] > 0, lambda: f"{ids.shape} is empty")
        return 1000

    assert kvpass.compile(Watchful(window).eval(), CONFIG).generate([[1, 2, 3]], 2)
