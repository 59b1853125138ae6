"""Runs model.pt2 with torch; importing kvpass registers the ops that it calls."""

import importlib
import json
from pathlib import Path
from typing import Any

import torch

import kvpass  # noqa: F401


class Program:
    """One step: integers in, logits out."""

    def __init__(self, folder: Path, **sizes: int) -> None:
        self.manifest = json.loads((folder / "manifest.json").read_text(encoding="utf-8"))
        for name in self.manifest["imports"]:
            importlib.import_module(name)
        self.step = torch.export.load(folder / "model.pt2").module()
        self.caches = [
            torch.zeros([sizes.get(size, size) for size in port["shape"]], dtype=getattr(torch, port["dtype"]))
            for port in self.manifest["inputs"]
            if port["is_cache"]
        ]

    def run(self, **inputs: Any) -> Any:
        """Logits ``[rows, vocabulary]`` of int64 arrays."""
        with torch.no_grad():
            values = [torch.as_tensor(array) for array in inputs.values()]
            return self.step(*values, *self.caches).float().numpy()
