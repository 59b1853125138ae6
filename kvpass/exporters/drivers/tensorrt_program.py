"""Runs model.engine with TensorRT for RTX on a GPU. Caches are bound once as input and output, and written in place."""

import json
from pathlib import Path
from typing import Any

import tensorrt_rtx
import torch


class Program:
    """One step: integers in, logits out."""

    def __init__(self, folder: Path, **sizes: int) -> None:
        self.manifest = json.loads((folder / "manifest.json").read_text(encoding="utf-8"))
        self.runtime = tensorrt_rtx.Runtime(tensorrt_rtx.Logger())
        self.engine = self.runtime.deserialize_cuda_engine((folder / "model.engine").read_bytes())
        self.context, self.stream = self.engine.create_execution_context(), torch.cuda.Stream()
        self.caches = []
        for port in self.manifest["inputs"]:
            if port["is_cache"]:
                shape = [sizes.get(size, size) for size in port["shape"]]
                held = torch.zeros(shape, dtype=getattr(torch, port["dtype"]), device="cuda")
                self.context.set_tensor_address(port["name"] + "_out", held.data_ptr())
                self.caches.append((port["name"], held))

    def run(self, **inputs: Any) -> Any:
        """Logits ``[rows, vocabulary]`` of int64 arrays."""
        values = {name: torch.as_tensor(array).to("cuda", torch.int64) for name, array in inputs.items()}
        wide = values["token_ids"].shape[1] > 1
        self.context.set_optimization_profile_async(int(wide), self.stream.cuda_stream)
        for name, tensor in (*values.items(), *self.caches):
            self.context.set_input_shape(name, tuple(tensor.shape))
            self.context.set_tensor_address(name, tensor.data_ptr())
        port = next(port for port in self.manifest["outputs"] if port["name"] == "logits")
        shape = tuple(self.context.get_tensor_shape("logits"))
        logits = torch.empty(shape, dtype=getattr(torch, port["dtype"]), device="cuda")
        self.context.set_tensor_address("logits", logits.data_ptr())
        self.stream.wait_stream(torch.cuda.current_stream())
        self.context.execute_async_v3(self.stream.cuda_stream)
        self.stream.synchronize()
        return logits.float().cpu().numpy()

    def copy_row(self, source: int, target: int) -> None:
        """Give one row of the caches what another holds."""
        for _, held in self.caches:
            held[target] = held[source]
