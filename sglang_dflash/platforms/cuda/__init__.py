"""CUDA: which of SGLang's attention backends window passes run beside, and what they cannot do there."""

from __future__ import annotations

from typing import Any

from sglang_dflash.draft.config import DraftConfig
from sglang_dflash.kernels.limits import HEAD_SIZES
from sglang_dflash.platforms import PLAIN_ATTENTION, Backend, Need, either, other_attention
from sglang_dflash.targets import Target

FAST_ATTENTION, ANY_ATTENTION = "fa3", "flashinfer"
# Sinks, targets' sliding layers and images are written, and have not been seen on a GPU.
BACKENDS = {
    FAST_ATTENTION: Backend(FAST_ATTENTION, frozenset({Need.DELTA_NETS}), HEAD_SIZES),
    ANY_ATTENTION: Backend(ANY_ATTENTION, frozenset({Need.FP8_CACHE}), HEAD_SIZES),
    PLAIN_ATTENTION: Backend(PLAIN_ATTENTION),
}
FAST_CAPABILITIES = 8, 9  # first numbers of the compute capabilities that FlashAttention-3 is made for
LEAST_CAPABILITY, FP8_CAPABILITY = (8, 0), (8, 9)  # of our ops, and with keys and values in eight bits
# Where one op attends to prefix and window, beside FlashAttention-3 (scripts/time_attention.py has found it faster):
SHORT_PREFIX = 768  # behind prefixes of up to so many tokens, however wide the window is
NARROW = 16  # and in windows of up to so many rows, tokens times query heads a key, behind any prefix


def is_narrow(width: int, heads: int, kv_heads: int) -> bool:
    """Whether one op attends to windows of this many tokens behind any prefix."""
    return width * (heads // kv_heads) <= NARROW


def parts_of(backend: Any) -> list[Any]:
    """SGLang's two backends of a model some of whose layers keep a state, attention's first; or the only one."""
    return getattr(backend, "attn_backend_list", None) or [backend]


def check_room(requests: int, room: int) -> None:
    """Raise ValueError where graphs of so many requests would read tables made for fewer."""
    if room < requests:
        raise ValueError(f"graphs of {requests} requests need tables of as many, and room was made for {room}")


def attention_backend(asked: Any, dtype: str) -> str:
    """Which attention backend serves target and draft at this --dtype: FlashAttention-3, or FlashInfer if that is asked
    for. Both take 16 bits only.

    asked: what the user gave. "auto" is never float32: SGLang serves a checkpoint in float32 as float16.
    """
    if dtype in ("float32", "float"):
        return PLAIN_ATTENTION
    wishes = asked.attention_backend, asked.prefill_attention_backend, asked.decode_attention_backend
    return ANY_ATTENTION if ANY_ATTENTION in wishes else FAST_ATTENTION


def unserved(
    asked: Any, arguments: Any, draft: DraftConfig, target: Target, capability: tuple[int, int]
) -> str:
    """What of a server's wishes window passes cannot do on CUDA, as part of a sentence; nothing where they can.

    asked: what the user gave, with SGLang's names: its own choice of an attention backend binds nobody. arguments: the
    same as SGLang settled them so far; capability: the GPU's.
    """
    if arguments.tp_size > 1:
        return f"--tp-size {arguments.tp_size} is more than one, and trees have been shared by ranks on CPUs alone"
    if capability < LEAST_CAPABILITY:
        return "the GPU has compute capability {}.{}, and trees need {}.{}".format(*capability, *LEAST_CAPABILITY)
    backend = attention_backend(asked, arguments.dtype)
    if backend == FAST_ATTENTION and capability[0] not in FAST_CAPABILITIES:
        return (
            "trees need FlashAttention-3, which compute capability {}.{} has not, or --attention-backend {}, which has "
            "served them on no such GPU yet".format(*capability, ANY_ATTENTION)
        )
    if other := other_attention(asked, backend):
        return f"{other} reads no tree, {backend} does"
    if lacking := next(BACKENDS[backend].lacks(target), ""):
        return lacking
    if Need.FP8_CACHE in target.needs and capability < FP8_CAPABILITY:
        return "keys and values in eight bits need compute capability {}.{}".format(*FP8_CAPABILITY)
    if draft.head_dim not in HEAD_SIZES:
        return f"the draft's head size {draft.head_dim} is not {either(HEAD_SIZES)}"
    return ""


def register_attention() -> None:
    """Put ours in place of SGLang's backends; each is imported when a runner is to have it."""
    from sglang.srt.layers.attention.attention_registry import register_attention_backend

    register_attention_backend(FAST_ATTENTION)(_make_fast_attention)
    register_attention_backend(ANY_ATTENTION)(_make_any_attention)


def _make_fast_attention(runner: Any) -> Any:
    from sglang_dflash.platforms.cuda.fa3 import FlashAttentionWindows

    return FlashAttentionWindows(runner)


def _make_any_attention(runner: Any) -> Any:
    from sglang_dflash.platforms.cuda.flashinfer import FlashInferWindows

    return FlashInferWindows(runner)
