"""What a format needs to be installed, and the command that installs it."""

from __future__ import annotations

from collections.abc import Sequence
from importlib.util import find_spec

from kvpass.errors import InputError
from kvpass.exporters.manifest import installed

EXTRAS = {
    "onnx": "onnx",
    "onnxscript": "onnx",
    "onnxruntime": "onnx",
    "onnxruntime_genai": "genai",
    "tensorrt_rtx": "tensorrt",
}


def require(format: str, modules: Sequence[str]) -> None:
    """See that what a format needs is there.

    Raises:
        InputError: naming the command that installs what is missing, or the two packages that exclude each other.
    """
    if "onnxruntime" in modules and installed("onnxruntime") and installed("onnxruntime-gpu"):
        raise InputError(
            "onnxruntime and onnxruntime-gpu are both installed, and overwrite each other's files: "
            "pip uninstall -y onnxruntime onnxruntime-gpu, then install the one that you want"
        )
    missing = [name for name in modules if find_spec(name) is None]
    if missing:
        raise InputError(
            f"format {format} needs {', '.join(missing)}: pip install 'kvpass[{EXTRAS.get(missing[0], missing[0])}]'"
        )
