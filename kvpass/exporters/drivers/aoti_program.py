"""Runs the compiled package model.pt2 with torch alone: it calls no op of kvpass."""

import json
from pathlib import Path
from typing import Any

import torch


class Program:
    """One step: integers in, logits out."""

    def __init__(self, folder: Path, **sizes: int) -> None:
        self.manifest = json.loads((folder / "manifest.json").read_text(encoding="utf-8"))
        self.step = torch._inductor.aoti_load_package(str(folder / "model.pt2"))
        self.caches = [
            torch.zeros([sizes.get(size, size) for size in port["shape"]], dtype=getattr(torch, port["dtype"]))
            for port in self.manifest["inputs"]
            if port["is_cache"]
        ]

    def run(self, **inputs: Any) -> Any:
        """Logits ``[rows, vocabulary]`` of int64 arrays."""
        values = [torch.as_tensor(array) for array in inputs.values()]
        logits = self.step(*values, *self.caches)
        return (logits[0] if isinstance(logits, (list, tuple)) else logits).float().numpy()
