"""Bytes per token of the tensors that an engine allocates, at the real widths of a large model."""

import pytest
import torch
from torch import nn

import kvpass
from tests.parity.harness import allocated_bytes_per_token

transformers = pytest.importorskip("transformers")

CONFIG = kvpass.CacheConfig(block_size=16, num_blocks=2)


@pytest.mark.sweep
def test_deepseek_v3_at_its_real_widths_holds_576_numbers_instead_of_40960() -> None:
    """One layer with the widths of the published config; vocabulary and feed-forward, which no cache sees, cut down."""
    model = deepseek_v3_layer()
    engine = kvpass.compile(model, CONFIG)
    (site,) = engine.report.sites
    size = 2  # bfloat16
    assert site.bytes_per_token_before == size * 40_960 == size * 128 * (128 + 64 + 128)
    assert allocated_bytes_per_token(engine) == site.bytes_per_token == size * 576 == size * (512 + 64)
    assert engine.report.verification is not None and engine.report.verification.passed
    assert site.error is not None and site.error < 2e-2


def deepseek_v3_layer() -> nn.Module:
    config = transformers.DeepseekV3Config(
        vocab_size=64, num_hidden_layers=1, first_k_dense_replace=1, intermediate_size=64, n_routed_experts=4
    )
    attention = (config.num_attention_heads, config.kv_lora_rank, config.qk_rope_head_dim, config.qk_nope_head_dim)
    assert attention == (128, 512, 64, 128) and config.v_head_dim == 128 and config.hidden_size == 7168
    with torch.device("meta"):
        model = transformers.DeepseekV3ForCausalLM(config)
    model = model.to(torch.bfloat16).to_empty(device="cpu")
    model.model.rotary_emb = type(model.model.rotary_emb)(config)  # its frequencies are no weights
    drawn = torch.randn(1 << 20, generator=torch.Generator().manual_seed(0)).bfloat16()
    with torch.no_grad():
        for number, parameter in enumerate(model.parameters()):
            if parameter.dim() == 1:
                parameter.fill_(1)
                continue
            for i, piece in enumerate(parameter.view(-1).split(len(drawn))):  # drawing them all would take a minute
                piece.copy_(drawn.roll(7919 * i + number)[: len(piece)])
            parameter.mul_(parameter.shape[1] ** -0.5)
    return model.eval()
