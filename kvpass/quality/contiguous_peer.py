"""The yardstick: `pydecoder` with a contiguous cache, written by hand for this one model.

kvpass does not use it. It is what a person writes who knows the model and gives every sequence a tensor of the longest
length from the start: no blocks, no sharing, no scheduler. Measurements put kvpass beside it, and a test holds that it
computes what the model computes.

It is written to be fast: projections that read the same input are one matrix, the norm is torch's fused one, rotary
angles are a table, and the query heads of a group are handed to ``scaled_dot_product_attention`` as rows over the keys
they share, which on a processor is quicker than two matrix products and far quicker than repeated keys.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from kvpass.models.pydecoder import Block, PyDecoder, rotate


@dataclass(frozen=True, eq=False)
class PeerLayer:
    """Weights of one layer, those with a common input joined, and its cache.

    Attributes:
        attention_norm: ``[d_model]``.
        qkv: ``[(Hq + 2 * Hkv) * D, d_model]``.
        output: ``[d_model, Hq * D]``.
        feed_forward_norm: ``[d_model]``.
        gate_up: ``[2 * d_ff, d_model]``.
        down: ``[d_model, d_ff]``.
        keys: ``[N, Hkv, L, D]``.
        values: ``[N, Hkv, L, D]``.
    """

    attention_norm: Tensor
    qkv: Tensor
    output: Tensor
    feed_forward_norm: Tensor
    gate_up: Tensor
    down: Tensor
    keys: Tensor
    values: Tensor


class ContiguousDecoder:
    """Greedy decoding of a batch with keys and values in one contiguous tensor per layer.

    Attributes:
        lengths: tokens that each sequence has in the cache, int64 ``[N]``.
    """

    def __init__(self, model: PyDecoder, batch: int, max_length: int) -> None:
        """Reserve the cache for ``batch`` sequences of up to ``max_length`` tokens."""
        config = model.config
        self.heads, self.kv_heads, self.head_dim = config.num_heads, config.num_kv_heads, config.head_dim
        self.epsilon = config.norm_eps
        self.embedding = model.embed.weight.detach()
        self.final_norm = model.norm.weight.detach()
        angles = torch.outer(torch.arange(max_length, dtype=torch.float32), model.inv_freq)
        angles = torch.cat((angles, angles), dim=-1)
        self.cos, self.sin = angles.cos().to(self.embedding.dtype), angles.sin().to(self.embedding.dtype)
        shape = (batch, self.kv_heads, max_length, self.head_dim)
        blocks = [block for block in model.layers if isinstance(block, Block)]
        self.layers = [_layer(block, shape) for block in blocks]
        self.rows = torch.arange(batch)
        self.columns = torch.arange(max_length)
        self.lengths = torch.zeros(batch, dtype=torch.int64)

    @property
    def reserved_bytes(self) -> int:
        """Bytes of all caches."""
        return sum(tensor.nbytes for layer in self.layers for tensor in (layer.keys, layer.values))

    @torch.inference_mode()
    def start(self, prompts: Sequence[Sequence[int]]) -> list[int]:
        """Forget everything, read N prompts, and return the next token of each."""
        self.lengths = torch.tensor([len(prompt) for prompt in prompts])
        longest = int(self.lengths.max())
        ids = torch.tensor([[*prompt, *[0] * (longest - len(prompt))] for prompt in prompts])
        x = F.embedding(ids, self.embedding)
        cos, sin = self.cos[:longest], self.sin[:longest]
        group = self.heads // self.kv_heads
        for layer in self.layers:
            q, k, v = self._project(layer, x, cos, sin)
            layer.keys[:, :, :longest], layer.values[:, :, :longest] = k, v
            k, v = k.repeat_interleave(group, dim=1), v.repeat_interleave(group, dim=1)
            mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True)
            x = self._finish(layer, x, mixed.transpose(1, 2).flatten(2))
        return self._next(x[self.rows, self.lengths - 1])

    @torch.inference_mode()
    def step(self, tokens: Sequence[int]) -> list[int]:
        """Append one token to each sequence, and return the next one of each."""
        batch, position = len(tokens), self.lengths
        self.lengths = position + 1
        first, longest = int(position.min()), int(self.lengths.max())
        visible: Tensor | None = None
        if longest - first > 1:  # ragged: what stands past the end of a sequence is not its own
            visible = (self.columns[:longest] < self.lengths[:, None])[:, None, None]
        x = F.embedding(torch.tensor(tokens)[:, None], self.embedding)
        cos, sin = self.cos[position][:, None, None], self.sin[position][:, None, None]
        for layer in self.layers:
            q, k, v = self._project(layer, x, cos, sin)
            layer.keys[self.rows, :, position], layer.values[self.rows, :, position] = k[:, :, 0], v[:, :, 0]
            keys, values = layer.keys[:, :, :longest], layer.values[:, :, :longest]
            q = q.reshape(batch, self.kv_heads, -1, self.head_dim)
            mixed = F.scaled_dot_product_attention(q, keys, values, attn_mask=visible)
            x = self._finish(layer, x, mixed.reshape(batch, 1, -1))
        return self._next(x[:, 0])

    def _project(self, layer: PeerLayer, x: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Rotated queries ``[N, Hq, S, D]`` and keys, and values ``[N, Hkv, S, D]``, of ``x [N, S, d_model]``."""
        qkv = (
            F.linear(self._norm(x, layer.attention_norm), layer.qkv).unflatten(-1, (-1, self.head_dim)).transpose(1, 2)
        )
        turned = rotate(qkv[:, : self.heads + self.kv_heads], cos, sin)
        return turned[:, : self.heads], turned[:, self.heads :], qkv[:, self.heads + self.kv_heads :]

    def _finish(self, layer: PeerLayer, x: Tensor, mixed: Tensor) -> Tensor:
        """The rest of a layer after attention: ``x`` and ``mixed [N, S, Hq * D]`` to ``[N, S, d_model]``."""
        x = x + F.linear(mixed, layer.output)
        gate, up = F.linear(self._norm(x, layer.feed_forward_norm), layer.gate_up).chunk(2, dim=-1)
        return x + F.linear(F.silu(gate) * up, layer.down)

    def _norm(self, x: Tensor, weight: Tensor) -> Tensor:
        return F.rms_norm(x, weight.shape, weight, self.epsilon)

    def _next(self, x: Tensor) -> list[int]:
        """The most likely token of each row of ``x [N, d_model]``."""
        tokens: list[int] = F.linear(self._norm(x, self.final_norm), self.embedding).argmax(-1).tolist()
        return tokens


def _layer(block: Block, cache_shape: tuple[int, int, int, int]) -> PeerLayer:
    attention, feed_forward = block.attention, block.feed_forward
    projections = (attention.q_proj, attention.k_proj, attention.v_proj)
    return PeerLayer(
        attention_norm=block.attention_norm.weight.detach(),
        qkv=torch.cat([projection.weight.detach() for projection in projections]),
        output=attention.o_proj.weight.detach(),
        feed_forward_norm=block.feed_forward_norm.weight.detach(),
        gate_up=torch.cat([feed_forward.gate_proj.weight.detach(), feed_forward.up_proj.weight.detach()]),
        down=feed_forward.down_proj.weight.detach(),
        keys=attention.k_proj.weight.new_zeros(cache_shape).detach(),
        values=attention.v_proj.weight.new_zeros(cache_shape).detach(),
    )
