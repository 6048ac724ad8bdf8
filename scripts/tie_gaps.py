"""How near a tie plain decoding is where its own wider passes decide otherwise, and where trees do. In bfloat16.

    python scripts/tie_gaps.py --out docs/results/gpu/tie_gaps.jsonl

Asks servers of the embedded target on this GPU for greedy answers, without speculation and with several trees, first
one prompt at a time, then all at once. What a gap is and where answers part is told by tests/e2e/test_lossless_bf16.py.
"""

from __future__ import annotations

import json
import sys
from contextlib import ExitStack
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from transformers import AutoTokenizer

from sglang_dflash import embedded
from sglang_dflash.cli.server import starting

sys.path.append(str(Path(__file__).parents[1] / "tests" / "e2e"))
import test_lossless_bf16 as lossless
from client import accept_length, generate

SERVER = "--log-level warning --mem-fraction-static 0.5 --max-total-tokens 65536 --dtype bfloat16"
TREES = {
    "63 nodes, 15 deep": "--speculative-num-draft-tokens 63 --speculative-num-steps 15",
    "15 nodes, 8 deep": "--speculative-num-draft-tokens 15 --speculative-num-steps 8",
    "2 nodes, 2 deep": "--speculative-num-draft-tokens 2 --speculative-num-steps 2",
    "chain of 7": "--speculative-num-draft-tokens 7 --speculative-num-steps 7 --speculative-eagle-topk 1",
}
LISTED = 12  # of the widest gaps
QUANTILES = (0.05, 0.1, 0.2, 0.3, 0.5)


def main(
    out: Annotated[Path, typer.Option(help="A JSON line a way of asking goes there.")],
    backend: Annotated[str, typer.Option(help="Attention backend of all servers.")] = "fa3",
) -> None:
    """Gaps, in log-probability, at which greedy bfloat16 answers leave plain decoding's."""
    pair = embedded.ensure()
    bodies = lossless.greedy_chats(AutoTokenizer.from_pretrained(pair.target))
    asked = lossless.with_gaps(bodies)
    console, base = Console(), ["--model-path", str(pair.target), "--attention-backend", backend, *SERVER.split()]
    with ExitStack() as stack, out.open("w", buffering=1) as file:

        def tell(**row: Any) -> None:
            file.write(json.dumps(row) + "\n")
            console.print_json(data=row)

        plain = stack.enter_context(starting("plain", base))
        dflash = ["--speculative-algorithm", "DFLASH"]
        servers = {
            name: stack.enter_context(starting(name, [*base, *dflash, *args.split()])) for name, args in TREES.items()
        }
        url = plain.ready(console)
        alone = generate(url, asked, 1)
        gaps = sorted(lossless.gap(a, at) for a in alone for at in range(lossless.length(a)))
        quantiles = {str(q): round(gaps[int(len(gaps) * q)], 3) for q in QUANTILES}
        tell(by="plain", tokens=len(gaps), quantiles_of_all_gaps=quantiles)
        for together in (32, len(asked)):
            parted = lossless.parted(alone, generate(url, asked, together))
            tell(by="plain", together=together, **described(parted))
        read = generate(url, lossless.readings(asked, alone), 1)
        tell(by="plain, reading", **described(lossless.misread(alone, read)))
        for name, server in servers.items():
            url = server.ready(console)
            for together in (1, len(bodies)):
                got = generate(url, bodies, together)
                length = round(accept_length(got), 2)
                tell(by=name, together=together, accept_length=length, **described(lossless.parted(alone, got)))


def described(gaps: list[float]) -> dict[str, Any]:
    return {"count": len(gaps), "widest": sorted(round(gap, 3) for gap in gaps)[-LISTED:]}


if __name__ == "__main__":
    typer.run(main)
