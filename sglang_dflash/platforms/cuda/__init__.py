"""CUDA: attention of window passes beside SGLang's FlashAttention-3 backend, and what it cannot serve."""

from __future__ import annotations

from typing import Any

from sglang_dflash.draft.config import DraftConfig
from sglang_dflash.platforms import other_attention

ATTENTION_BACKEND = "fa3"


def unserved(arguments: Any, draft: DraftConfig, target: dict[str, Any], capability: tuple[int, int]) -> str:
    """What of a server's wishes window passes cannot do on CUDA, as part of a sentence; nothing where they can.

    arguments: with SGLang's names; target: its config.json; capability: the GPU's.
    """
    if capability[0] not in (8, 9):
        return f"trees need FlashAttention-3, which compute capability {capability[0]}.{capability[1]} has not"
    if asked := other_attention(arguments, ATTENTION_BACKEND):
        return f"{asked} reads no tree, {ATTENTION_BACKEND} does"
    if arguments.dtype in ("float32", "float"):
        return f"--dtype {arguments.dtype} is not FlashAttention-3's, which takes 16 bits"
    if arguments.kv_cache_dtype not in ("auto", "bf16", "bfloat16"):
        return f"--kv-cache-dtype {arguments.kv_cache_dtype} is not the draft's"
    if target.get("kv_lora_rank"):
        return "the target has multi-head latent attention"
    kinds = sorted({*(target.get("layer_types") or ())} - {"full_attention"})
    if kinds:
        return f"the target has layers of {kinds[0]}"
    if max(draft.window_left) >= 0:
        return "the draft has layers with a sliding window"
    if len(set(draft.causal_layers)) > 1:
        return "the draft has both causal and bidirectional layers"
    return ""
