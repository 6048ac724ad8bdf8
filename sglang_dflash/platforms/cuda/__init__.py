"""CUDA: which of SGLang's attention backends window passes run beside, and what they cannot do there."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from sglang_dflash.draft.config import DraftConfig
from sglang_dflash.kernels.limits import HEAD_SIZES
from sglang_dflash.platforms import PLAIN_ATTENTION, Backend, Need, either, other_attention
from sglang_dflash.targets import Target

FAST_ATTENTION, FLASHINFER, TRITON, FA4 = "fa3", "flashinfer", "triton", "fa4"
# What each was seen with on a GPU. FlashInfer has no sliding windows, as SGLang's prefill by it leaves the window out
# where a prompt has no prefix in the cache, and no sinks.
_MOST = frozenset({Need.DELTA_NETS, Need.IMAGES, Need.WINDOWS, Need.SINKS, Need.FP8_CACHE})
BACKENDS = {
    FAST_ATTENTION: Backend(FAST_ATTENTION, _MOST, HEAD_SIZES),
    FLASHINFER: Backend(FLASHINFER, frozenset({Need.DELTA_NETS, Need.IMAGES, Need.FP8_CACHE}), HEAD_SIZES),
    TRITON: Backend(TRITON, _MOST, HEAD_SIZES),
    FA4: Backend(FA4, frozenset({Need.DELTA_NETS}), (64, 128)),  # on Blackwell its kernel of size 256 reads no pages
    PLAIN_ATTENTION: Backend(PLAIN_ATTENTION),
}
# First numbers of the compute capabilities that a backend is made for; the others are for any.
FAST_CAPABILITIES = 8, 9
CAPABILITIES = {FAST_ATTENTION: FAST_CAPABILITIES, FA4: (9, 10)}
LEAST_CAPABILITY, FP8_CAPABILITY = (7, 5), (8, 9)  # of our ops, and with keys and values in eight bits
FP8_CAPABILITIES = {FAST_ATTENTION: (9, 0)}  # of a backend whose prefills ask for more then
# Where one op attends to prefix and window, beside FlashAttention-3 (scripts/time_attention.py has found it faster):
SHORT_PREFIX = 1536  # behind prefixes of up to so many tokens, however wide the window is
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
    """Which attention backend serves target and draft at this --dtype: FlashAttention-3, or another one of ours if that
    is asked for. All of them take 16 bits only.

    asked: what the user gave. "auto" is never float32: SGLang serves a checkpoint in float32 as float16.
    """
    if dtype in ("float32", "float"):
        return PLAIN_ATTENTION
    wishes = asked.attention_backend, asked.prefill_attention_backend, asked.decode_attention_backend
    return next((wish for wish in wishes if wish in (FLASHINFER, TRITON, FA4)), FAST_ATTENTION)


def made_for(backend: str, capability: tuple[int, int]) -> bool:
    """Whether this one of ours runs on GPUs of a compute capability."""
    return backend not in CAPABILITIES or capability[0] in CAPABILITIES[backend]


def unserved(
    asked: Any, arguments: Any, draft: DraftConfig, target: Target, capability: tuple[int, int]
) -> str:
    """What of a server's wishes window passes cannot do on CUDA, as part of a sentence; nothing where they can.

    asked: what the user gave, with SGLang's names: its own choice of an attention backend binds nobody. arguments: the
    same as SGLang settled them so far; capability: the GPU's.
    """
    if capability < LEAST_CAPABILITY:
        return "the GPU has compute capability {}.{}, and trees need {}.{}".format(*capability, *LEAST_CAPABILITY)
    backend = attention_backend(asked, arguments.dtype)
    if not made_for(backend, capability):
        others = either([name for name in _MAKERS if made_for(name, capability)])
        return (
            "attention by {} is not made for compute capability {}.{}: there trees need --attention-backend {}, seen "
            "on no such GPU yet".format(backend, *capability, others)
        )
    if other := other_attention(asked, backend):
        if backend in _MAKERS and other.split()[-1] in _MAKERS:
            return f"{other} is not {backend}, and all passes of target and draft have one attention backend"
        return f"{other} reads no tree, {backend} does"
    if lacking := next(_lacks(backend, target, capability), ""):
        able = [name for name in _MAKERS if made_for(name, capability) and not any(_lacks(name, target, capability))]
        return f"{lacking} (--attention-backend {either(able)} does)" if able else lacking
    if draft.head_dim not in HEAD_SIZES:
        return f"the draft's head size {draft.head_dim} is not {either(HEAD_SIZES)}"
    if arguments.tp_size > 1 and (unseen := next(_unseen_in_shares(backend, target), "")):
        return f"{unseen}, which was not seen on several GPUs (--tp-size {arguments.tp_size})"
    return ""


def _lacks(backend: str, target: Target, capability: tuple[int, int]) -> Iterator[str]:
    """What the target needs and this backend does not do on such a GPU, as parts of a sentence."""
    yield from BACKENDS[backend].lacks(target)
    least = FP8_CAPABILITIES.get(backend, FP8_CAPABILITY)
    if Need.FP8_CACHE in target.needs and capability < least:
        yield "keys and values in eight bits beside {} need compute capability {}.{}".format(backend, *least)


def _unseen_in_shares(backend: str, target: Target) -> Iterator[str]:
    """What was seen on one GPU alone, as parts of a sentence."""
    yield from target.needs.values()
    if backend != FAST_ATTENTION:
        yield f"attention is by {backend}"


def register_attention() -> None:
    """Put ours in place of SGLang's backends; each is imported when a runner is to have it."""
    from sglang.srt.layers.attention.attention_registry import register_attention_backend

    for name, make in _MAKERS.items():
        register_attention_backend(name)(make)


def _make_fa3(runner: Any) -> Any:
    from sglang_dflash.platforms.cuda.fa3 import FlashAttentionWindows

    return FlashAttentionWindows(runner)


def _make_flashinfer(runner: Any) -> Any:
    from sglang_dflash.platforms.cuda.flashinfer import FlashInferWindows

    return FlashInferWindows(runner)


def _make_triton(runner: Any) -> Any:
    from sglang_dflash.platforms.cuda.triton import TritonWindows

    return TritonWindows(runner)


def _make_fa4(runner: Any) -> Any:
    from sglang_dflash.platforms.cuda.fa4 import FlashAttention4Windows

    return FlashAttention4Windows(runner)


_MAKERS = {FAST_ATTENTION: _make_fa3, FLASHINFER: _make_flashinfer, TRITON: _make_triton, FA4: _make_fa4}
