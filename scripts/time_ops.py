"""Time the compiled ops of a step on this GPU, at the sizes of an 8B target.

    python scripts/time_ops.py --out docs/results/ops.json

Each op runs fifty times in one CUDA graph, so what is timed is the GPU's work and the gap between two launches, not
Python. Plain torch's time beside it is of such a graph with the plain ops, but for those that serve a CPU alone. Needs
torch, apache-tvm-ffi and nvcc alone.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Annotated

import torch
import typer
from rich.console import Console
from rich.table import Table

from sglang_dflash.kernels import Emitted, Leads, Pools, compiled, plain

REPEATS, ROUNDS = 50, 7
NODES, DEPTH, K, RANK, VOCAB = 63, 15, 16, 128, 151_936
HEADS, KV_HEADS, SIZE, LAYERS, TARGET_LAYERS = 32, 8, 128, 5, 36
PREFIX, LEADS, WORDS = 500, 12, 300

ON_A_CPU = {"sample", "penalise"}  # whose plain ones read values on the host, which no graph can hold

Case = tuple[str, Callable[[], object], Callable[[], object]]


def cases(bs: int) -> list[Case]:
    """(name, compiled, plain) of each op for a batch of bs requests, on the arguments a step would give."""
    w, m = NODES + 1, DEPTH + 1
    bf16 = torch.bfloat16
    logits = (torch.randn(bs * DEPTH, VOCAB) * 3).to(bf16)
    unary, tokens, lse = (x.view(bs, DEPTH, *x.shape[1:]) for x in plain.topk_lse(logits, K))
    bonus = torch.randint(VOCAB, (bs,))
    gate, a, b = torch.randn(bs, DEPTH, RANK).to(bf16), *torch.randn(2, VOCAB, RANK).to(bf16)
    logp = plain.selector_logp(unary, lse, tokens, bonus, gate * 0.1, a, b)
    chain = torch.arange(LEADS).expand(bs, -1).contiguous()
    leads = Leads(chain + 7, chain - 1, torch.ones(bs, dtype=torch.int64))
    tree, parents, _, _, mask = plain.grow(tokens, logp, bonus, NODES)
    sampled = torch.randint(VOCAB, (bs, w))
    for node in range(1, w):  # the deepest path is followed, the longest walk there is
        sampled.scatter_(1, parents[:, node : node + 1], tree[:, node : node + 1])
    nodes, _, lens, _ = plain.walk(tree, parents, mask, sampled, None, DEPTH)
    slots = 1 + torch.arange(bs * w).view(bs, w)
    prefix = torch.full((bs,), PREFIX)
    q, k, v = (torch.randn(bs * w, heads, SIZE).to(bf16) for heads in (HEADS, KV_HEADS, KV_HEADS))
    prefix_lse, out = torch.randn(bs, HEADS, w), torch.randn(bs * w, HEADS, SIZE).to(bf16)
    caches = torch.zeros(2, bs * w + 1, KV_HEADS, SIZE, dtype=bf16)
    pages = torch.arange(bs * PREFIX, dtype=torch.int32).view(bs, PREFIX)
    paged = torch.randn(2, bs * PREFIX, KV_HEADS, SIZE).to(bf16)
    kv = torch.randn(bs * m, 2, LAYERS, KV_HEADS, SIZE).to(bf16)
    pools = Pools.of([torch.zeros(bs * w + 1, KV_HEADS, SIZE, dtype=bf16) for _ in range(2 * LAYERS)])
    k_norm, cos_sin = torch.ones(LAYERS, 1, SIZE, dtype=bf16), torch.rand(8192, SIZE)
    source, destination, _, positions, context_slots = plain.commit_rows(slots, prefix, nodes, lens, w)
    verified, places = (torch.randn(bs * w, VOCAB) * 3).to(bf16), prefix[:, None] + torch.arange(w)
    any_k, everything, none = torch.full((bs,), 1 << 30, dtype=torch.int32), torch.ones(bs), torch.zeros(bs)
    of_samples = torch.arange(bs), torch.ones(bs), any_k, everything, none
    emitted = penalised(bs)
    slot_table = torch.zeros(bs, 8192, dtype=torch.int32)
    target_pools = Pools.of([torch.zeros(bs * w + 1, KV_HEADS, SIZE, dtype=bf16) for _ in range(2 * TARGET_LAYERS)])
    arguments = {
        "topk_lse": (logits, K),
        "selector_logp": (unary, lse, tokens, bonus, gate, a, b),
        "lattice_logp": (unary, lse, None),
        "place_leads": (unary, tokens, leads),
        "follow_leads": (logp, plain.place_leads(unary, tokens, leads)[1], leads),
        "grow": (tokens, logp, bonus, NODES),
        "grow_chain": (tokens, logp, bonus, DEPTH),
        "window_attention": (q, k, v, mask, prefix_lse, out, *caches, slots.flatten(), SIZE**-0.5, 0.0),
        "tree_attention": (q, k, v, mask, prefix.int(), pages, 1, *paged, slots.flatten(), SIZE**-0.5, 0.0),
        "walk": (tree, parents, mask, sampled, None, DEPTH),
        "sample": (verified, places.flatten(), *of_samples, False),
        "penalise": (verified.view(bs, w, VOCAB), torch.arange(bs), places, emitted, tree, mask),
        "count_emitted": (emitted, torch.arange(bs), tree[:, :m], lens),
        "assign_slots": (torch.arange(bs), slot_table, prefix, prefix + m, slots[:, :m].flatten()),
        "open_window": (slot_table, torch.arange(bs), prefix, prefix + w, prefix + DEPTH, bonus, 0, w, m),
        "commit_rows": (slots, prefix, nodes, lens, w),
        "move_rows": (target_pools, source, destination, bs),
        "write_context": (kv, k_norm, cos_sin, positions, context_slots, pools, 1e-5),
    }
    return [
        (name, *(lambda op=getattr(ops, name), args=args: op(*args) for ops in (compiled, plain)))
        for name, args in arguments.items()
    ]


def penalised(bs: int) -> Emitted:
    """Of bs requests, each with penalties and some words that it has emitted."""
    emitted = Emitted.none(bs, VOCAB, torch.get_default_device())
    emitted.grow(bs)
    emitted.places.copy_(torch.arange(bs))
    emitted.settings.copy_(torch.tensor([0.5, 0.2, 1.1]))
    emitted.counts.scatter_(1, torch.randint(VOCAB, (bs, WORDS)), 1)
    return emitted


def microseconds(run: Callable[[], object]) -> float:
    """Of one call, the least of a few rounds: what the GPU takes when nothing else does."""
    for _ in range(3):
        run()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(REPEATS):
            run()
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    taken = []
    for _ in range(ROUNDS):
        start.record()
        graph.replay()
        end.record()
        end.synchronize()
        taken.append(start.elapsed_time(end))
    return 1000 * min(taken) / REPEATS


def main(
    out: Annotated[Path | None, typer.Option(help="where the figures go, as JSON")] = None,
    batch_sizes: Annotated[str, typer.Option(help="comma-separated")] = "1,64",
) -> None:
    """Print, and write to OUT, microseconds a call by op and batch size."""
    if not torch.cuda.is_available():
        raise typer.BadParameter("torch sees no GPU: the compiled ops run on one")
    torch.manual_seed(0)
    rows = []
    with torch.device("cuda"), torch.inference_mode():
        for bs in map(int, batch_sizes.split(",")):
            for name, ours, torchs in cases(bs):
                plain_us = None if name in ON_A_CPU else microseconds(torchs)
                rows.append({"op": name, "bs": bs, "us": microseconds(ours), "plain_us": plain_us})
    device = torch.cuda.get_device_name()
    table = Table("op", "requests", "µs", "plain torch, µs", title=f"{device}, torch {torch.__version__}")
    for row in rows:
        us, plain_us = row["us"], row["plain_us"]
        table.add_row(row["op"], str(row["bs"]), f"{us:.1f}", "" if plain_us is None else f"{plain_us:.1f}")
    Console().print(table)
    if out is not None:
        report = {"device": device, "torch": torch.__version__, "nodes": NODES, "depth": DEPTH, "k": K, "rows": rows}
        out.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    typer.run(main)
