"""Tiny random-weight causal language models of the families that transformers knows.

`tiny("llama")` gives the module, in eval mode, and its vocabulary size. The families that build, run and are causal are
listed in `families.txt` beside this file; `python -m kvpass.models.zoo llama mistral` checks them one by one, and
`python -m kvpass.models.zoo list` tries every family of the installed transformers.

Weights are drawn wider than a model is initialised with: at the usual spread some families give the same tokens
whatever the prompt, and no test of a cache could fail on them.
"""

import json
import multiprocessing
import queue
import sys
import traceback
import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, PretrainedConfig
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

FAMILIES_FILE = Path(__file__).with_name("families.txt")
MAX_PARAMETERS = 30_000_000

# Every size that some config names; a config takes those that it knows.
SIZES: dict[str, Any] = {
    **dict.fromkeys(("hidden_size", "n_embd", "d_model", "dim", "embed_dim", "embedding_size"), 64),
    **dict.fromkeys(("word_embed_proj_dim",), 64),
    **dict.fromkeys(("num_hidden_layers", "n_layer", "num_layers", "n_layers", "decoder_layers"), 3),
    **dict.fromkeys(("num_attention_heads", "n_head", "num_heads", "n_heads"), 4),
    **dict.fromkeys(("decoder_attention_heads", "encoder_attention_heads"), 4),
    **dict.fromkeys(("num_key_value_heads", "num_kv_heads", "n_head_kv", "encoder_layers"), 2),
    **dict.fromkeys(("intermediate_size", "n_inner", "ffn_dim", "ffn_hidden_size"), 96),
    **dict.fromkeys(("decoder_ffn_dim", "encoder_ffn_dim"), 96),
    **dict.fromkeys(("max_position_embeddings", "n_positions", "n_ctx", "max_seq_len"), 256),
    **dict.fromkeys(("seq_length", "max_sequence_length"), 256),
    **dict.fromkeys(("num_local_experts", "num_experts", "n_routed_experts"), 4),
    **dict.fromkeys(("num_experts_per_tok", "num_experts_per_token"), 2),
    **dict.fromkeys(("moe_intermediate_size", "shared_expert_intermediate_size"), 48),
    **dict.fromkeys(("expert_ffn_hidden_size", "ffn_hidden_size_moe"), 48),
    **dict.fromkeys(("n_group", "topk_group", "n_shared_experts", "first_k_dense_replace"), 1),
    **dict.fromkeys(("head_dim", "qk_nope_head_dim", "v_head_dim", "index_head_dim"), 16),
    **dict.fromkeys(("linear_key_head_dim", "linear_value_head_dim"), 16),
    **dict.fromkeys(("initializer_range", "init_std"), 0.1),
    "vocab_size": 199,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "sliding_window": 24,
    "rotary_dim": 8,
    "qk_rope_head_dim": 8,
    "q_lora_rank": 32,
    "kv_lora_rank": 24,
    "moe_latent_size": 32,
    "mamba_n_heads": 4,
    "mamba_d_head": 32,
    "mamba_expand": 2,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "index_n_heads": 2,
    "index_topk": 8,
    "index_block_size": 4,
    "index_topk_blocks": 2,
    "full_attn_idxs": [1],
    "compress_rates": {"compressed_sparse_attention": 4, "heavily_compressed_attention": 8},
}
LAYER_COUNTS = ("num_hidden_layers", "n_layer", "num_layers", "n_layers")
LAYER_LISTS = ("layer_types", "mlp_layer_types")
# Kinds of layers that a family has beside those of its default config.
MORE_KINDS = {"minimax_m3_vl_text": ("minimax_m3_sparse",)}

Row = dict[str, Any]


@dataclass(frozen=True)
class Family:
    """A line of `families.txt`.

    Attributes:
        model_type: the name by which transformers knows it.
        kind: `attention` (softmax attention is the only token mixing), `hybrid` (convolutions or recurrences as well)
            or `selects` (keys chosen by data).
    """

    model_type: str
    kind: str


def families() -> tuple[Family, ...]:
    """The families of `families.txt`, in its order."""
    lines = FAMILIES_FILE.read_text(encoding="utf-8").splitlines()
    return tuple(Family(*line.split()) for line in lines if line and not line.startswith("#"))


def tiny_config(model_type: str, **extra: Any) -> PretrainedConfig:
    """A config of the family with every size cut down; `extra` overrides fields of it.

    Raises:
        NotImplementedError: for a config composed of several models.
    """
    base = AutoConfig.for_model(model_type)
    if not hasattr(base, "decoder_layers") and base.get_text_config(decoder=True) is not base:
        raise NotImplementedError(f"{model_type}: a config composed of several models")
    known = base.to_dict()
    sizes = {name: value for name, value in {**SIZES, **extra}.items() if name in known}
    if getattr(base, "sliding_window", None) is None and "sliding_window" not in extra:
        sizes.pop("sliding_window", None)
    if "qk_rope_head_dim" in known:
        sizes.pop("head_dim", None)
    if "kv_lora_rank" in known and "num_key_value_heads" in known:
        sizes["num_key_value_heads"] = sizes.get("num_attention_heads", 4)
    try:
        config = type(base)(**sizes)
    except Exception:  # some configs check sizes against defaults that are not overridden yet
        config = type(base)()
        for name, value in sizes.items():
            setattr(config, name, value)
    _fit_layer_lists(config, base)
    return config


def _fit_layer_lists(config: PretrainedConfig, base: PretrainedConfig) -> None:
    """Lists with an entry per layer fit the layers there are, and every kind of layer comes up."""
    layers = next((getattr(config, name) for name in LAYER_COUNTS if hasattr(config, name)), 3)
    for name in LAYER_LISTS:
        have = getattr(config, name, None)
        more = MORE_KINDS.get(base.model_type, ()) if name == "layer_types" else ()
        kinds = list(dict.fromkeys((*(getattr(base, name, None) or ()), *more)))
        if isinstance(have, list | tuple) and (len(have) != layers or len(set(have)) < min(layers, len(kinds))):
            with suppress(AttributeError):  # where the list follows from other fields
                setattr(config, name, [kinds[i % len(kinds)] for i in range(layers)])


def redraw(model: nn.Module, seed: int, spread: float) -> nn.Module:
    """Draw projections, embeddings and experts anew with the given spread; leaves norms and recurrences alone."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parts = name.split(".")
            if parts[-1] == "bias":
                parameter.copy_(0.1 * torch.randn(parameter.shape, generator=generator))
            elif parameter.dim() > 1 and ("experts" in parts or (parts[-1] == "weight" and parameter.dim() == 2)):
                parameter.copy_(spread * torch.randn(parameter.shape, generator=generator))
    return model


def tiny(
    model_type: str, attn: str = "sdpa", seed: int = 0, spread: float = 0.25, **extra: Any
) -> tuple[nn.Module, int]:
    """A tiny model of the family in eval mode, and its vocabulary size.

    Args:
        model_type: the name by which transformers knows the family.
        attn: `"sdpa"` or `"eager"`; eager where a family has nothing else.
        seed: of all weights.
        spread: of projections, embeddings and experts.
        extra: fields of the config.
    """
    torch.manual_seed(seed)
    config = tiny_config(model_type, **extra)
    for name, value in (("is_decoder", True), ("add_cross_attention", False)):
        if hasattr(config, name):
            setattr(config, name, value)
    try:
        model = AutoModelForCausalLM.from_config(config, attn_implementation=attn)
    except ValueError as error:
        if "does not support" not in str(error):
            raise
        model = AutoModelForCausalLM.from_config(config, attn_implementation="eager")
    count = sum(parameter.numel() for parameter in model.parameters())
    if count > MAX_PARAMETERS:
        raise ValueError(f"{model_type} is not tiny: {count / 1e6:.0f}M parameters")
    redraw(model, seed, spread)
    return model.eval(), int(getattr(config, "vocab_size", SIZES["vocab_size"]))


def probe(model_type: str) -> Row:
    """Does the family run, and is it causal: does a later token leave every earlier logit alone?"""
    model, vocab_size = tiny(model_type)
    ids = torch.randint(3, vocab_size, (2, 11))
    changed = ids.clone()
    changed[:, -1] = (changed[:, -1] + 1) % vocab_size
    with torch.no_grad():
        logits = model(input_ids=ids, use_cache=False).logits
        moved = model(input_ids=changed, use_cache=False).logits[:, :-1] - logits[:, :-1]
    if not logits.isfinite().all():
        raise ValueError("logits are not finite")
    return {"params": sum(p.numel() for p in model.parameters()), "causal": moved.abs().max().item() < 1e-4}


def check_each(model_types: Iterable[str], check: Callable[[str], Row], seconds: float = 60) -> Iterator[Row]:
    """Run `check(model_type)` for each family in a process of its own, so that a crash or a hang costs one row."""
    context = multiprocessing.get_context("fork")
    for model_type in model_types:
        answers: multiprocessing.Queue[Row] = context.Queue()
        process = context.Process(target=_answer, args=(model_type, check, answers))
        process.start()
        try:
            row = answers.get(timeout=seconds)
        except queue.Empty:
            row = {"type": model_type, "ok": False, "why": f"no answer in {seconds} s"}
        process.join(2)
        if process.is_alive():
            process.kill()
        yield row


def _answer(model_type: str, check: Callable[[str], Row], answers: "multiprocessing.Queue[Row]") -> None:
    try:
        answers.put({"type": model_type, "ok": True, **check(model_type)})
    except BaseException as error:
        last = traceback.extract_tb(error.__traceback__)[-1]
        why = f"{type(error).__name__}: {str(error)[:300]} @{last.name}"
        answers.put({"type": model_type, "ok": False, "why": why})


def main() -> None:
    """Print a JSON line for each family named on the command line; `list` names all of transformers."""
    warnings.filterwarnings("ignore")
    transformers.logging.set_verbosity_error()
    torch.set_num_threads(1)
    named = sys.argv[1:]
    for row in check_each(list(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES) if named == ["list"] else named, probe):
        print(json.dumps(row), flush=True)


if __name__ == "__main__":
    main()
