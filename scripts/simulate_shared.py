"""What nodes shared across the batch would bring; no server, no model, no GPU.

usage: simulate_shared.py TRACE.npz OUT.json --roof roof.json

A step's batch has N nodes in all. Shared: the N likeliest paths of all requests, so that a request whose draft is
unsure has few. Beside it the best tree of equally many nodes for each request, of any size, not of the ladder's alone.
Both are given the best N and depth of all that were tried, for each group of TRACE.npz (record_trace.py) and each
number of requests at once; costs are a GPU's linear layers (time_roof.py), so that ragged windows cost nothing here.
`useless`: a share of the requests accepts nothing, however sure its draft is; where these are known and get no nodes,
"told" shares among the others and "others" gives each of them equally many.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import numpy as np
from simulate_budget import Passes

AT_ONCE = (16, 64, 128)
USELESS = (0.0, 0.25, 0.5)
DEPTHS = (2, 4, 7, 10, 15)
EACH = (0.5, 1, 1.5, 2, 3, 4, 5, 6, 7, 9, 11, 15, 20, 31)  # nodes a request, on the mean
STEPS = 100


def emitted(nodes: np.ndarray, taken: np.ndarray) -> int:
    """Tokens of all requests whose walks are nodes [B, depth], in trees that hold taken [B, 32] bool."""
    return len(nodes) + int((np.take_along_axis(taken, nodes, 1) & (nodes > 0)).sum())


def ranks(logp: np.ndarray) -> np.ndarray:
    """Each node's place among the nodes of all requests, the likeliest first; logp [B, 32]."""
    places = np.empty(logp.size, dtype=np.int64)
    places[np.argsort(-logp.ravel(), kind="stable")] = np.arange(logp.size)
    return places.reshape(logp.shape)


def compare(trace: Any, of_group: np.ndarray, passes: Passes, at_once: int, useless: float) -> dict[str, Any]:
    """Tokens a second of the best setting of each way."""
    rng = np.random.default_rng(5)
    at = rng.choice(of_group, size=(STEPS, at_once))
    dead = np.arange(at_once) < round(useless * at_once)
    best: dict[str, tuple[float, int, float]] = dict.fromkeys(("equal", "shared", "told", "others"), (0.0, 0, 0.0))
    plain = at_once / passes.seconds(at_once, 0)
    for depth in DEPTHS:
        tokens: dict[tuple[str, float], float] = dict.fromkeys(((way, each) for way in best for each in EACH), 0.0)
        for row in at:
            nodes, logp = trace["nodes"][row][:, :depth].astype(int), trace["logp"][row].astype(float)
            nodes[dead] = 0
            logp[trace["depths"][row] > depth] = -np.inf
            logp[:, 0] = -np.inf  # the root is verified anyway
            there = np.isfinite(logp)
            rank, told = ranks(logp), ranks(np.where(dead[:, None], -np.inf, logp))
            for each in EACH:
                total = round(each * at_once)
                tokens["shared", each] += emitted(nodes, there & (rank < total))
                tokens["told", each] += emitted(nodes, there & (told < total))
                if each == int(each):
                    same = there & (np.arange(logp.shape[1]) <= each)
                    tokens["equal", each] += emitted(nodes, same)
                    tokens["others", each] += emitted(nodes, same & ~dead[:, None])
        for (way, each), count in tokens.items():
            drafted = each * (at_once - dead.sum() if way == "others" else at_once)
            seconds = STEPS * passes.seconds(at_once + round(drafted), at_once * (depth + 1))
            best[way] = max(best[way], (count / seconds, depth, each))
    ways = {
        way: {"tok_s": round(rate, 1), "depth": depth, "nodes_each": each} for way, (rate, depth, each) in best.items()
    }
    return {"at_once": at_once, "useless": useless, "plain": round(plain, 1), **ways}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("trace", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--roof", type=Path, required=True)
    args = parser.parse_args()
    with np.load(args.trace) as content:
        trace = dict(content)
    passes, rows = Passes(args.roof), []
    sizes = np.diff(trace["starts"])
    groups = np.repeat(trace["groups"], sizes)
    for group in dict.fromkeys(trace["groups"]):
        for at_once in AT_ONCE:
            for useless in USELESS:
                row = {"group": str(group), **compare(trace, np.flatnonzero(groups == group), passes, at_once, useless)}
                rows.append(row)
                least = max(row["equal"]["tok_s"], row["plain"])
                gains = (f"{way} {row[way]['tok_s'] / least:.3f}" for way in ("shared", "told", "others"))
                each = row["equal"]["nodes_each"]
                print(f"{group:8} {at_once:4}, {useless:.0%} useless: {each} each,", ", ".join(gains))
    device = json.loads(args.roof.read_text())["device"]
    args.out.write_text(json.dumps({"device": device, "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
