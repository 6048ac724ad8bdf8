"""SmolLM2-135M-Instruct from its GGUF file (see weights.py), as a checkpoint SGLang loads.

Linear layers are Q4_1 and the embedding Q8_0 in that file; they are dequantised here and kept as bfloat16,
the precision that the draft was trained against.
"""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

from sglang_dflash.embedded import cache, weights

logger = logging.getLogger(__name__)

RECIPE = 1  # raise it when what is written below changes
DIRECTORY = f"smollm2-135m-{weights.GGUF_SHA256[:8]}-{RECIPE}"

# GGUF's names of a layer's tensors, and transformers'.
LAYER_NAMES = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
OTHER_NAMES = {"token_embd.weight": "model.embed_tokens.weight", "output_norm.weight": "model.norm.weight"}


def ensure() -> Path:
    """The target's checkpoint directory, made ready if it is not."""
    return cache.ensure(DIRECTORY, _build)


def _build(directory: Path) -> None:
    from gguf import GGUFReader  # here and below: heavy imports that only a first use needs

    with weights.gguf() as file:
        logger.info("making the embedded target ready in %s (once)", cache.root() / DIRECTORY)
        reader = GGUFReader(file)
        config = _config(reader)
        _write_json(directory / "config.json", config)
        _write_json(directory / "generation_config.json", {k: config[k] for k in TOKEN_IDS})
        _write_tokenizer(reader, directory)
        _write_weights(reader, config, directory)


TOKEN_IDS = {  # config.json's name of a special token's id, and GGUF's
    "bos_token_id": "tokenizer.ggml.bos_token_id",
    "eos_token_id": "tokenizer.ggml.eos_token_id",
    "pad_token_id": "tokenizer.ggml.padding_token_id",
}


def _value(reader: Any, key: str) -> Any:
    return reader.fields[key].contents()


def _config(reader: Any) -> dict[str, Any]:
    heads = _value(reader, "llama.attention.head_count")
    hidden = _value(reader, "llama.embedding_length")
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": _value(reader, "llama.vocab_size"),
        "hidden_size": hidden,
        "intermediate_size": _value(reader, "llama.feed_forward_length"),
        "num_hidden_layers": _value(reader, "llama.block_count"),
        "num_attention_heads": heads,
        "num_key_value_heads": _value(reader, "llama.attention.head_count_kv"),
        "head_dim": hidden // heads,
        "hidden_act": "silu",
        "max_position_embeddings": _value(reader, "llama.context_length"),
        "rms_norm_eps": 1e-5,  # GGUF keeps it as a float32
        "rope_theta": _value(reader, "llama.rope.freq_base"),
        "attention_bias": False,
        "mlp_bias": False,
        "tie_word_embeddings": True,
        "dtype": "bfloat16",
        **{name: _value(reader, key) for name, key in TOKEN_IDS.items()},
    }


def _write_tokenizer(reader: Any, directory: Path) -> None:
    from gguf import TokenType
    from tokenizers import AddedToken, Tokenizer, decoders, pre_tokenizers
    from tokenizers.models import BPE

    tokens = _value(reader, "tokenizer.ggml.tokens")
    kinds = _value(reader, "tokenizer.ggml.token_type")
    merges = [tuple(m.split(" ")) for m in _value(reader, "tokenizer.ggml.merges")]
    tokenizer = Tokenizer(BPE({token: i for i, token in enumerate(tokens)}, merges))
    # GGUF's pre-tokenizer "smollm": every digit on its own, then GPT-2's splits.
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    control = [t for t, kind in zip(tokens, kinds, strict=True) if kind == TokenType.CONTROL]
    tokenizer.add_special_tokens([AddedToken(t, normalized=False, special=True) for t in control])
    tokenizer.save(str(directory / "tokenizer.json"))
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",  # as tokenizer.json says, nothing added
        "clean_up_tokenization_spaces": False,
        "model_max_length": _value(reader, "llama.context_length"),
        "chat_template": _value(reader, "tokenizer.chat_template"),
        **{name[: -len("_id")]: tokens[_value(reader, key)] for name, key in TOKEN_IDS.items()},
    }
    _write_json(directory / "tokenizer_config.json", config)


def _write_weights(reader: Any, config: dict[str, Any], directory: Path) -> None:
    import torch
    from gguf import dequantize
    from safetensors.torch import save_file

    heads = {"attn_q": config["num_attention_heads"], "attn_k": config["num_key_value_heads"]}
    state = {}
    for tensor in reader.tensors:
        name, kind = _name(tensor.name)
        array = dequantize(tensor.data, tensor.tensor_type)  # float32, [out, in] or [hidden]
        if kind in heads:
            array = _unpermute(array, heads[kind])
        state[name] = torch.from_numpy(array.copy()).to(torch.bfloat16)
    save_file(state, directory / "model.safetensors", metadata={"format": "pt"})


def _name(gguf_name: str) -> tuple[str, str]:
    """transformers' name of a GGUF tensor, and its kind within a layer ("" outside of layers)."""
    if gguf_name in OTHER_NAMES:
        return OTHER_NAMES[gguf_name], ""
    _, layer, kind, _ = gguf_name.split(".")  # blk.7.attn_q.weight
    return f"model.layers.{layer}.{LAYER_NAMES[kind]}.weight", kind


def _unpermute(array: Any, heads: int) -> Any:
    """Rows of a q or k projection from GGUF's order (rotary pairs adjacent) to transformers' (halves)."""
    rows, columns = array.shape
    return array.reshape(heads, rows // heads // 2, 2, columns).swapaxes(1, 2).reshape(rows, columns)


def _write_json(file: Path, value: dict[str, Any]) -> None:
    file.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n")
