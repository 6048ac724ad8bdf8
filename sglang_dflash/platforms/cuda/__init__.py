"""CUDA: attention of window passes beside SGLang's FlashAttention-3 backend, and what window passes cannot do there."""

from __future__ import annotations

from typing import Any

from sglang_dflash.draft.config import DraftConfig
from sglang_dflash.kernels.limits import HEAD_SIZES
from sglang_dflash.platforms import PLAIN_ATTENTION, Backend, either, other_attention
from sglang_dflash.targets import Target

FAST_ATTENTION = "fa3"
# Sinks and targets' sliding layers are in the ops, and have not been seen on a GPU.
BACKENDS = {
    FAST_ATTENTION: Backend(FAST_ATTENTION, head_sizes=HEAD_SIZES),
    PLAIN_ATTENTION: Backend(PLAIN_ATTENTION),
}
FAST_CAPABILITIES = 8, 9  # first numbers of the compute capabilities it is made for
# Where one op attends to prefix and window, which scripts/time_attention.py has found the faster way:
SHORT_PREFIX = 768  # behind prefixes of up to so many tokens, however wide the window is
NARROW = 16  # and in windows of up to so many rows, tokens times query heads a key, behind any prefix


def is_narrow(width: int, heads: int, kv_heads: int) -> bool:
    """Whether one op attends to windows of this many tokens behind any prefix."""
    return width * (heads // kv_heads) <= NARROW


def parts_of(backend: Any) -> list[Any]:
    """SGLang's two backends of a model some of whose layers keep a state, attention's first; or the only one."""
    parts: list[Any] = getattr(backend, "attn_backend_list", [backend])
    return parts


def attention_backend(dtype: str) -> str:
    """Which attention backend serves target and draft at this --dtype: FlashAttention-3 takes 16 bits only.

    "auto" is never float32: SGLang serves a checkpoint in float32 as float16.
    """
    return PLAIN_ATTENTION if dtype in ("float32", "float") else FAST_ATTENTION


def unserved(
    asked: Any, arguments: Any, draft: DraftConfig, target: Target, capability: tuple[int, int]
) -> str:
    """What of a server's wishes window passes cannot do on CUDA, as part of a sentence; nothing where they can.

    asked: what the user gave, with SGLang's names: its own choice of an attention backend binds nobody. arguments: the
    same as SGLang settled them so far; capability: the GPU's.
    """
    if arguments.tp_size > 1:
        return f"--tp-size {arguments.tp_size} is more than one, and trees have been shared by ranks on CPUs alone"
    backend = attention_backend(arguments.dtype)
    if backend == FAST_ATTENTION and capability[0] not in FAST_CAPABILITIES:
        return f"trees need FlashAttention-3, which compute capability {capability[0]}.{capability[1]} has not"
    if other := other_attention(asked, backend):
        return f"{other} reads no tree, {backend} does"
    if lacking := next(BACKENDS[backend].lacks(target), ""):
        return lacking
    if draft.head_dim not in HEAD_SIZES:
        return f"the draft's head size {draft.head_dim} is not {either(HEAD_SIZES)}"
    return ""
