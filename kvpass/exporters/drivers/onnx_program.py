"""Runs model.onnx with ONNX Runtime. The caches are bound once as input and output, and so are written in place."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime

BFLOAT16 = 16  # what ONNX calls numbers that numpy has not; their bits are handed over


def value_over(array: Any, dtype: str) -> Any:
    """A value of the runtime in the memory of an array."""
    if dtype == "bfloat16":
        return onnxruntime.OrtValue.ortvalue_from_numpy_with_onnx_type(array, BFLOAT16)
    return onnxruntime.OrtValue.ortvalue_from_numpy(array)


class Program:
    """One step: integers in, logits out."""

    def __init__(self, folder: Path, **sizes: int) -> None:
        self.manifest = json.loads((folder / "manifest.json").read_text(encoding="utf-8"))
        options = onnxruntime.SessionOptions()
        options.log_severity_level = 3
        self.session = onnxruntime.InferenceSession(str(folder / "model.onnx"), options, ["CPUExecutionProvider"])
        self.binding = self.session.io_binding()
        self.caches: list[Any] = []  # arrays in whose memory the runtime reads and writes
        for port in self.manifest["inputs"]:
            if port["is_cache"]:
                shape = [sizes.get(size, size) for size in port["shape"]]
                array = np.zeros(shape, np.uint16 if port["dtype"] == "bfloat16" else port["dtype"])
                held = value_over(array, port["dtype"])
                self.binding.bind_ortvalue_input(port["name"], held)
                self.binding.bind_ortvalue_output(port["name"] + "_out", held)
                self.caches.append(array)

    def run(self, **inputs: Any) -> Any:
        """Logits ``[rows, vocabulary]`` of int64 arrays."""
        for name, array in inputs.items():
            self.binding.bind_cpu_input(name, np.ascontiguousarray(array, np.int64))
        self.binding.bind_output("logits")
        self.session.run_with_iobinding(self.binding)
        return self.binding.get_outputs()[-1].numpy()  # bound after the caches

    def copy_row(self, source: int, target: int) -> None:
        """Give one row of the caches what another holds."""
        for array in self.caches:
            array[target] = array[source]
