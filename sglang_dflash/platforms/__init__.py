"""Where trees run, and what each platform needs."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from enum import Enum, auto
from typing import Any

PLAIN_ATTENTION = "plain_torch"  # SGLang's name for the attention backend in plain_attention.py
# Requests with whom prompts are read in verify passes. Where fewer run, prompts come so seldom that nothing is gained
# (at 16; at 64 a fifth), and a first token comes sooner from a pass of its own. A prompt's windows see the keys of
# others: so passes of so many windows or more write all keys before any is read.
WITH_PROMPTS = 32
PROMPT_TOKENS = 512  # of prompts that a verify pass reads at most, in windows like those of its trees


class Need(Enum):
    """What some targets ask of window passes, and not every attention backend does in one."""

    WINDOWS = auto()  # layers that slide
    SINKS = auto()
    DELTA_NETS = auto()  # layers that keep a state, which a rejected token must not have changed
    IMAGES = auto()  # positions on three axes, and a vision tower beside
    OTHER_LAYERS = auto()  # kinds of layers that neither slide nor see all
    FP8_CACHE = auto()  # keys and values in eight bits


@dataclass(frozen=True)
class Backend:
    """What the window passes of an attention backend can do, as SGLang names it; head_sizes: none named, any."""

    name: str
    does: frozenset[Need] = frozenset()
    head_sizes: tuple[int, ...] = ()

    def lacks(self, target: Any) -> Iterator[str]:
        """What the target needs and this backend does not do, as parts of a sentence."""
        for need, words in target.needs.items():
            if need not in self.does:
                yield f"{words}, which window passes of {self.name} do not serve here yet"
        if self.head_sizes and target.head_dim not in self.head_sizes:
            yield f"the target's head size {target.head_dim} is not {either(self.head_sizes)}"


def either(choices: Sequence[Any]) -> str:
    *others, last = map(str, choices)
    return f"{', '.join(others)} or {last}" if others else last


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


def windows_beside(width: int) -> int:
    """Windows of prompts that a pass of this width has room for; those of one token would be too many."""
    return PROMPT_TOKENS // width if width > 1 else 0


def eager_windows(original: Callable[[int], int], requests: int) -> int:
    """Around SGLang's count of what its passes without a CUDA graph have room for."""
    return original(requests) + windows_beside(2)
