"""A small decoder of Python text in plain PyTorch, written as if no KV cache had ever been thought of.

`forward(input_ids) -> logits` over the whole sequence, and nothing else: grouped-query attention with rotary positions,
RMSNorm before each half of a block, a SwiGLU feed-forward, embeddings tied to the output. The shipped checkpoint lies
beside this file, in the folder `pydecoder-checkpoint/` (see its MODEL_CARD.md).

    model = load(CHECKPOINT)                     # float32, eval mode
    tokenizer = load_tokenizer(CHECKPOINT)
    logits = model(torch.tensor([tokenizer.encode("import ").ids]))
"""

import json
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer
from torch import Tensor, nn

CHECKPOINT = Path(__file__).resolve().parent / "pydecoder-checkpoint"
END_OF_TEXT = "<|endoftext|>"


@dataclass(frozen=True)
class PyDecoderConfig:
    """Sizes of a `PyDecoder`; `config.json` of a checkpoint holds exactly these fields."""

    vocab_size: int = 4096
    d_model: int = 256
    num_layers: int = 4
    num_heads: int = 8
    num_kv_heads: int = 2
    head_dim: int = 64
    d_ff: int = 512
    rope_theta: float = 10000.0
    norm_eps: float = 1e-6
    max_length: int = 2048

    def __post_init__(self) -> None:
        if self.num_heads % self.num_kv_heads:
            raise ValueError(f"num_heads={self.num_heads} is no multiple of num_kv_heads={self.num_kv_heads}")
        if self.head_dim % 2:
            raise ValueError(f"head_dim={self.head_dim} is odd: rotary turns pairs of dims")

    @classmethod
    def from_file(cls, path: Path) -> "PyDecoderConfig":
        """Read a `config.json`; an unknown field is a TypeError."""
        return cls(**json.loads(path.read_text(encoding="utf-8")))

    def to_file(self, path: Path) -> None:
        """Write the fields as `config.json`."""
        path.write_text(json.dumps(asdict(self), indent=2) + "\n", encoding="utf-8")


class RMSNorm(nn.Module):
    """Root-mean-square norm over the last dim (arXiv:1910.07467), computed in float32, given back in x's dtype."""

    def __init__(self, dim: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(dim))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        """[..., dim] to [..., dim]."""
        wide = x.float()
        wide = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + self.eps)
        return (wide * self.weight.float()).to(x.dtype)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary positions (arXiv:2104.09864), halves as pairs: x [B, H, S, D], cos and sin [S, D], result [B, H, S, D]."""
    first, second = x.chunk(2, dim=-1)
    return x * cos + torch.cat((-second, first), dim=-1) * sin


class Attention(nn.Module):
    """Causal grouped-query attention (arXiv:2305.13245) over the whole sequence."""

    def __init__(self, config: PyDecoderConfig) -> None:
        super().__init__()
        self.num_heads, self.num_kv_heads = config.num_heads, config.num_kv_heads
        self.head_dim = config.head_dim
        self.q_proj = nn.Linear(config.d_model, config.num_heads * config.head_dim, bias=False)
        self.k_proj = nn.Linear(config.d_model, config.num_kv_heads * config.head_dim, bias=False)
        self.v_proj = nn.Linear(config.d_model, config.num_kv_heads * config.head_dim, bias=False)
        self.o_proj = nn.Linear(config.num_heads * config.head_dim, config.d_model, bias=False)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """x [B, S, d_model], cos and sin [S, D], result [B, S, d_model]."""
        batch, length, _ = x.shape
        q = self.q_proj(x).view(batch, length, self.num_heads, self.head_dim).transpose(1, 2)
        k = self.k_proj(x).view(batch, length, self.num_kv_heads, self.head_dim).transpose(1, 2)
        v = self.v_proj(x).view(batch, length, self.num_kv_heads, self.head_dim).transpose(1, 2)
        q, k = rotate(q, cos, sin), rotate(k, cos, sin)
        group = self.num_heads // self.num_kv_heads
        k, v = k.repeat_interleave(group, dim=1), v.repeat_interleave(group, dim=1)
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        out: Tensor = self.o_proj(mixed.transpose(1, 2).reshape(batch, length, self.num_heads * self.head_dim))
        return out


class FeedForward(nn.Module):
    """SwiGLU feed-forward (arXiv:2002.05202)."""

    def __init__(self, config: PyDecoderConfig) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(config.d_model, config.d_ff, bias=False)
        self.up_proj = nn.Linear(config.d_model, config.d_ff, bias=False)
        self.down_proj = nn.Linear(config.d_ff, config.d_model, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """[..., d_model] to [..., d_model]."""
        out: Tensor = self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))
        return out


class Block(nn.Module):
    """One layer: attention, then feed-forward, each behind its norm and added to the stream."""

    def __init__(self, config: PyDecoderConfig) -> None:
        super().__init__()
        self.attention_norm = RMSNorm(config.d_model, config.norm_eps)
        self.attention = Attention(config)
        self.feed_forward_norm = RMSNorm(config.d_model, config.norm_eps)
        self.feed_forward = FeedForward(config)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """x [B, S, d_model], cos and sin [S, D], result [B, S, d_model]."""
        x = x + self.attention(self.attention_norm(x), cos, sin)
        out: Tensor = x + self.feed_forward(self.feed_forward_norm(x))
        return out


class PyDecoder(nn.Module):
    """The decoder. It remembers nothing between calls: every call sees the whole text."""

    inv_freq: Tensor  # [D / 2] float32, radians per position

    def __init__(self, config: PyDecoderConfig) -> None:
        super().__init__()
        self.config = config
        self.embed = nn.Embedding(config.vocab_size, config.d_model)
        self.layers = nn.ModuleList(Block(config) for _ in range(config.num_layers))
        self.norm = RMSNorm(config.d_model, config.norm_eps)
        exponents = torch.arange(0, config.head_dim, 2, dtype=torch.float32) / config.head_dim
        self.register_buffer("inv_freq", config.rope_theta**-exponents, persistent=False)

    def forward(self, input_ids: Tensor) -> Tensor:
        """Next-token logits at every position: input_ids [B, S] int64 to [B, S, vocab_size] in the weights' dtype."""
        x = self.embed(input_ids)
        positions = torch.arange(input_ids.shape[1], device=input_ids.device, dtype=torch.float32)
        angles = torch.outer(positions, self.inv_freq)
        angles = torch.cat((angles, angles), dim=-1)
        cos, sin = angles.cos().to(x.dtype), angles.sin().to(x.dtype)
        for layer in self.layers:
            x = layer(x, cos, sin)
        return F.linear(self.norm(x), self.embed.weight)


def load(directory: Path | str = CHECKPOINT, dtype: torch.dtype = torch.float32) -> PyDecoder:
    """Read `config.json` and `model.safetensors` of a checkpoint folder into a module in eval mode, weights in `dtype`.

    A missing file is a FileNotFoundError; a tensor missing, left over or of another shape is a RuntimeError of
    `load_state_dict`.
    """
    folder = Path(directory)
    model = PyDecoder(PyDecoderConfig.from_file(folder / "config.json"))
    model.load_state_dict(load_file(folder / "model.safetensors"))
    for parameter in model.parameters():
        # Not `model.to(dtype)`: that would round `inv_freq` too, and with it every position above a few hundred.
        parameter.data = parameter.data.to(dtype)
    return model.eval()


def save(model: PyDecoder, directory: Path | str, dtype: torch.dtype = torch.bfloat16) -> None:
    """Write `config.json` and `model.safetensors`, the weights rounded to `dtype`."""
    folder = Path(directory)
    folder.mkdir(parents=True, exist_ok=True)
    model.config.to_file(folder / "config.json")
    weights = {name: tensor.detach().to(dtype).contiguous() for name, tensor in model.state_dict().items()}
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


def load_tokenizer(directory: Path | str = CHECKPOINT) -> Tokenizer:
    """Read `tokenizer.json` of a checkpoint folder: a byte-level BPE whose text `END_OF_TEXT` is one token, id 0."""
    tokenizer: Tokenizer = Tokenizer.from_file(str(Path(directory) / "tokenizer.json"))
    return tokenizer
