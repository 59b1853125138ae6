"""What a model and its rewrite are, as a digest: content that was stored by another one is never looked at."""

from __future__ import annotations

from hashlib import blake2b
from importlib.metadata import version

import torch
from torch import nn

from kvpass.types import CachePlan

DIGEST_BYTES = 16


def fingerprint(module: object, plan: CachePlan) -> str:
    """Hexadecimal digest of the rewritten graph, its weights, what it caches in which formats, and kvpass itself.

    Reads every weight once.
    """
    digest = blake2b(digest_size=DIGEST_BYTES)

    def add(part: bytes) -> None:
        digest.update(len(part).to_bytes(8, "little"))
        digest.update(part)

    add(version("kvpass").encode())
    add(f"{type(module).__module__}.{type(module).__qualname__}".encode())
    add(repr(plan).encode())
    if isinstance(module, nn.Module):
        for name, part in module.named_modules():
            code = getattr(part, "code", None)
            if isinstance(code, str):
                add(name.encode())
                add(code.encode())
        for name, tensor in (*module.named_parameters(), *module.named_buffers()):
            add(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
            # A part at a time: the weights may be larger than what is free on the host.
            for row in tensor.detach().reshape(tensor.shape[0] if tensor.dim() else 1, -1):
                add(row.contiguous().cpu().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()
