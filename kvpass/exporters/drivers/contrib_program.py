"""Runs model.onnx with ONNX Runtime's CUDA provider where there is one, and its twin of standard ops elsewhere."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime


class Program:
    """One step: integers in, logits out."""

    def __init__(self, folder: Path, **sizes: int) -> None:
        self.manifest = json.loads((folder / "manifest.json").read_text(encoding="utf-8"))
        options = onnxruntime.SessionOptions()
        options.log_severity_level = 3
        cuda = "CUDAExecutionProvider" in onnxruntime.get_available_providers()
        file, device = ("model.onnx", "cuda") if cuda else ("twin.onnx", "cpu")
        providers = (["CUDAExecutionProvider"] if cuda else []) + ["CPUExecutionProvider"]
        self.session = onnxruntime.InferenceSession(str(folder / file), options, providers)
        self.binding = self.session.io_binding()
        for port in self.manifest["inputs"]:
            if port["is_cache"]:
                shape = [sizes.get(size, size) for size in port["shape"]]
                held = onnxruntime.OrtValue.ortvalue_from_numpy(np.zeros(shape, port["dtype"]), device, 0)
                self.binding.bind_ortvalue_input(port["name"], held)
                self.binding.bind_ortvalue_output(port["name"] + "_out", held)

    def run(self, **inputs: Any) -> Any:
        """Logits ``[rows, vocabulary]`` of int64 arrays."""
        for name, array in inputs.items():
            self.binding.bind_cpu_input(name, np.ascontiguousarray(array, np.int64))
        self.binding.bind_output("logits")
        self.session.run_with_iobinding(self.binding)
        return self.binding.get_outputs()[-1].numpy()  # bound after the caches
