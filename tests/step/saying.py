"""What a server does with the tokens of a walk under a grammar."""

from __future__ import annotations

from typing import Any

from sglang_dflash.tree import Walk


def say(walked: Walk, said: list[int], grammar: Any, end: int) -> None:
    """The first request's walked tokens are said and its grammar takes them, up to the end token."""
    for token in walked.tokens[0, : int(walked.lens[0])].tolist():
        said.append(token)
        grammar.accept_token(token)
        if token == end:
            return
