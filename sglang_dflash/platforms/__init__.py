"""Where trees run, and what each platform needs."""

from __future__ import annotations

from typing import Any

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
