"""Where trees run, and what each platform needs."""

from __future__ import annotations

from typing import Any

PLAIN_ATTENTION = "plain_torch"  # SGLang's name for the attention backend in plain_attention.py

_ATTENTION_ARGUMENTS = (
    "attention_backend",
    "prefill_attention_backend",
    "decode_attention_backend",
    "speculative_draft_attention_backend",
)


def other_attention(arguments: Any, backend: str) -> str:
    """The first option, with its value, that asks for another attention backend than this; nothing if none does."""
    for name in _ATTENTION_ARGUMENTS:
        asked = getattr(arguments, name)
        if asked not in (None, backend):
            return f"--{name.replace('_', '-')} {asked}"
    return ""


def add_plain_attention() -> None:
    """Let the command line take the plain attention backend."""
    from sglang.srt.arg_groups.choices import add_attention_backend_choices, add_draft_attention_backend_choices

    add_attention_backend_choices([PLAIN_ATTENTION])
    add_draft_attention_backend_choices([PLAIN_ATTENTION])


def register_plain_attention() -> None:
    """Make it known to every runner of this process; SGLang's registry takes half a second to import."""
    from sglang.srt.layers.attention.attention_registry import register_attention_backend

    register_attention_backend(PLAIN_ATTENTION)(_make_plain_attention)


def _make_plain_attention(runner: Any) -> Any:
    from sglang_dflash.platforms.plain_attention import PlainAttnBackend

    return PlainAttnBackend(runner)
