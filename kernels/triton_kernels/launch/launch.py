"""A kernel launch as a value, and the device that it is for: all that is decided before a GPU is needed.

The functions that describe an op's launches run on any machine, on meta tensors too. So their grids can be tested, and
their kernels compiled ahead of time, where there is no GPU.
"""

from __future__ import annotations

import contextlib
import functools
import os
from dataclasses import dataclass
from typing import Any

import torch

INTERPRETED = os.environ.get("TRITON_INTERPRET", "0") == "1"
ARCHITECTURES = ("sm_80", "sm_90", "sm_100", "gfx942")


@dataclass(frozen=True)
class Target:
    """What launches depend on.

    Attributes:
        architecture: a key of :data:`kvpass.kernels.triton_kernels.launch.tuning.TILES`.
        processors: multiprocessors, or compute units.
        native_fp8: whether the device converts float8_e4m3fn itself; else the kernels read its bytes.
        interpreted: whether kernels run in Triton's interpreter, where bfloat16 arithmetic is wrong.
    """

    architecture: str
    processors: int
    native_fp8: bool = True
    interpreted: bool = False


@dataclass(frozen=True, eq=False)
class Launch:
    """One launch.

    Attributes:
        kernel: a Triton kernel.
        grid: programs along each axis; nothing is launched if one is 0.
        arguments: all arguments by name, compile-time constants included.
        warps: warps per program.
        stages: depth of the software pipeline.
    """

    kernel: Any
    grid: tuple[int, ...]
    arguments: dict[str, Any]
    warps: int = 4
    stages: int = 2

    def run(self) -> None:
        """Launch it on the device of its arguments, on the current stream there."""
        if not all(self.grid):
            return
        device = next(value.device for value in self.arguments.values() if isinstance(value, torch.Tensor))
        with torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext():
            self.kernel[self.grid](**self.arguments, num_warps=self.warps, num_stages=self.stages)


def find_target(device: torch.device) -> Target:
    """The target of a device; a small made-up one where kernels are interpreted."""
    if INTERPRETED:
        return Target("sm_90", processors=3, interpreted=True)
    return _target_of(torch.cuda.current_device() if device.index is None else device.index)


def architecture_of(major: int, minor: int, hip_name: str | None = None) -> tuple[str, bool]:
    """Table key of a device, and whether it has float8_e4m3fn: the newest known that is not newer than the device."""
    if hip_name is not None:
        return "gfx942", False
    if major >= 10:
        return "sm_100", True
    return ("sm_90", True) if major == 9 else ("sm_80", (major, minor) >= (8, 9))


@functools.cache
def _target_of(index: int) -> Target:
    found = torch.cuda.get_device_properties(index)
    name = found.gcnArchName if torch.version.hip else None
    architecture, native_fp8 = architecture_of(found.major, found.minor, name)
    return Target(architecture, found.multi_processor_count, native_fp8)
