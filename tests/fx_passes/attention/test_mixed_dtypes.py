"""Queries, keys and values of several dtypes: nothing is rounded to another's, and each cache has its own."""

import pytest
import torch
from torch import Tensor, nn

import kvpass
from tests.parity.harness import CONFIG

HALF, BRAIN, SINGLE = torch.float16, torch.bfloat16, torch.float32
NAMES = {HALF: "float16", BRAIN: "bfloat16", SINGLE: "float32"}


class Mixed(nn.Module):
    """Operands are rounded to a dtype each, and everything is computed in float32."""

    def __init__(self, *dtypes: torch.dtype) -> None:
        super().__init__()
        self.dtypes = dtypes
        self.embed, self.qkv, self.head = nn.Embedding(41, 16), nn.Linear(16, 48), nn.Linear(16, 41)
        generator = torch.Generator().manual_seed(0)
        with torch.no_grad():
            for parameter in self.parameters():
                parameter.copy_(0.5 * torch.randn(parameter.shape, generator=generator))

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embed(ids)
        parts = self.qkv(x).unflatten(-1, (3, 2, 8)).permute(2, 0, 3, 1, 4).unbind(0)
        q, k, v = (part.to(dtype) for part, dtype in zip(parts, self.dtypes, strict=True))
        hidden = torch.ones(ids.shape[1], ids.shape[1], dtype=torch.bool).triu(1)
        weights = (q.float() @ k.float().transpose(-2, -1)).masked_fill(hidden, -torch.inf).softmax(-1)
        return self.head(x + (weights @ v.float()).transpose(1, 2).flatten(-2))


@pytest.mark.sampled(4)
@pytest.mark.parametrize(
    "dtypes", [(BRAIN, BRAIN, SINGLE), (SINGLE, SINGLE, BRAIN), (SINGLE, BRAIN, SINGLE), (BRAIN, SINGLE, HALF)], ids=str
)
def test_each_part_keeps_its_dtype(dtypes: tuple[torch.dtype, ...]) -> None:
    torch.manual_seed(0)
    engine = kvpass.compile(Mixed(*dtypes).eval(), CONFIG)
    (spec,) = engine.plan.caches
    assert (spec.key_format, spec.value_format) == (NAMES[dtypes[1]], NAMES[dtypes[2]])
    verification = engine.report.verification
    assert verification is not None and verification.logits_error < 1e-5
