"""What demo and bench serve: the checkpoints asked for, their tokenizer, and SGLang's arguments for them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Any

import typer

from sglang_dflash import embedded

TargetOption = Annotated[
    str, typer.Option("--model", metavar="PATH", help="Target: a directory, a hub name, or the embedded one.")
]
DraftOption = Annotated[
    str | None, typer.Option("--draft", metavar="PATH", help="Its draft; the embedded target has one.")
]


@dataclass(frozen=True)
class Models:
    """A target and a draft for it, as SGLang takes them on its command line."""

    name: str  # as the user gave it
    draft_name: str
    target: str
    draft: str

    @classmethod
    def of(cls, target: str, draft: str | None) -> Models:
        """Names resolved; the embedded pair made ready where it is named. Raises `typer.BadParameter`."""
        pair = embedded.resolve(target)
        if draft is None and pair is None:
            raise typer.BadParameter(f"no draft for the target {target!r}: give one with --draft")
        draft_name = draft or embedded.NAME
        draft_pair = embedded.resolve(draft_name)
        return cls(
            name=target,
            draft_name=draft_name,
            target=str(pair.target) if pair else target,
            draft=str(draft_pair.draft) if draft_pair else draft_name,
        )

    def plain_args(self) -> list[str]:
        """SGLang's arguments for the target alone."""
        return ["--model-path", self.target]

    def dflash_args(self, nodes: int | None, draft: str | None = None) -> list[str]:
        """SGLang's arguments for the target and a draft: `nodes` drafted nodes a tree, None for the default."""
        args = ["--speculative-algorithm", "DFLASH", "--speculative-draft-model-path", draft or self.draft]
        if nodes is not None:
            args += ["--speculative-num-draft-tokens", str(nodes)]
        return [*self.plain_args(), *args]

    def tokenizer(self) -> Any:
        """The target's. Raises `typer.BadParameter` where there is none."""
        from transformers import AutoTokenizer  # seconds to import

        try:
            return AutoTokenizer.from_pretrained(self.target)
        except (OSError, ValueError) as error:  # no such directory or hub name, or one without a tokenizer
            raise typer.BadParameter(
                f"--model {self.name!r} gives no tokenizer: name a directory that holds one, or a model on the hub "
                f"({error})"
            ) from error
