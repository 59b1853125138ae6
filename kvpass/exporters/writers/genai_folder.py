"""What ONNX Runtime GenAI reads beside a model: ``genai_config.json`` for the plain contract, and a tokenizer."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from kvpass.exporters.writers.onnx_file import MODEL_FILE
from kvpass.types import CachePlan

CONFIG_FILE = "genai_config.json"
CONTEXT = 32768  # where the model has no limit of its own


def cannot_hold(plan: CachePlan) -> str | None:
    """Caches that GenAI cannot hand on: it has one shape for the keys and values of all layers."""
    shapes = {(spec.num_kv_heads, spec.key_dim) for spec in plan.caches}
    shapes |= {(spec.num_kv_heads, spec.value_dim) for spec in plan.caches}
    return None if len(shapes) == 1 else "caches of different shapes"


def write_config(folder: Path, plan: CachePlan, eos_token_ids: Sequence[int]) -> None:
    """Write the configuration of a model of type ``decoder``, which any graph of the plain contract is."""
    spec, ends = plan.caches[0], list(eos_token_ids)
    length = min(plan.max_length or CONTEXT, CONTEXT)
    config: dict[str, Any] = {
        "model": {
            "type": "decoder",
            "bos_token_id": 0,
            "eos_token_id": ends,
            "pad_token_id": ends[0] if ends else 0,
            "vocab_size": plan.vocab_size,
            "context_length": length,
            "decoder": {
                "filename": MODEL_FILE,
                "session_options": {"log_id": "onnxruntime-genai", "provider_options": []},
                "head_size": spec.key_dim,
                "hidden_size": spec.key_dim * spec.num_kv_heads,
                "num_attention_heads": spec.num_kv_heads,
                "num_key_value_heads": spec.num_kv_heads,
                "num_hidden_layers": len(plan.caches),
                "inputs": {
                    "input_ids": "input_ids",
                    "attention_mask": "attention_mask",
                    "past_key_names": "past_key_values.%d.key",
                    "past_value_names": "past_key_values.%d.value",
                },
                "outputs": {
                    "logits": "logits",
                    "present_key_names": "present.%d.key",
                    "present_value_names": "present.%d.value",
                },
            },
        },
        "search": {
            "do_sample": False,
            "max_length": length,
            "num_beams": 1,
            "num_return_sequences": 1,
            "past_present_share_buffer": False,
            "temperature": 1.0,
            "top_k": 1,
            "top_p": 1.0,
        },
    }
    (folder / CONFIG_FILE).write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


def write_tokenizer(folder: Path, tokenizer: Any) -> None:
    """Write a tokenizer of the ``tokenizers`` or the ``transformers`` library; nothing where there is none."""
    backend = getattr(tokenizer, "backend_tokenizer", tokenizer)
    save = getattr(backend, "save", None)
    if not callable(save):
        return
    save(str(folder / "tokenizer.json"))
    kind = {"tokenizer_class": "PreTrainedTokenizerFast"}
    (folder / "tokenizer_config.json").write_text(json.dumps(kind) + "\n", encoding="utf-8")
