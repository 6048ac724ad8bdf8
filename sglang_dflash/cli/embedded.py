"""`sglang-dflash embedded`: the paths of the embedded pair."""

from __future__ import annotations

import json
from typing import Annotated

import typer
from rich.console import Console

from sglang_dflash import embedded as pair


def embedded(
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Make the embedded target and draft ready, and print where they are."""
    with Console(stderr=True).status("making the embedded pair ready"):
        ready = pair.ensure()
    paths = {"target": str(ready.target), "draft": str(ready.draft)}
    if as_json:
        print(json.dumps(paths))
    else:
        for name, path in paths.items():
            print(f"{name:6}  {path}")
