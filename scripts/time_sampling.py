"""Time the sampling op beside FlashInfer's samplers on this GPU.

    python scripts/time_sampling.py docs/results/gpu/sampling_op.json

Each call is captured some times in one CUDA graph. Ours reads logits; FlashInfer's read what a softmax has made of
them, whose time stands by itself. Needs flashinfer, as SGLang installs it.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import flashinfer.sampling as samplers
import torch
import typer
from time_ops import VOCAB, microseconds
from torch import Tensor

from sglang_dflash.kernels import compiled

SIZES = [(1, 16), (64, 16), (1, 32), (1, 1), (256, 1)]  # requests, and nodes of each
ANY, TOP_K, TOP_P = 1 << 30, 50, 0.95
SEED = {"deterministic": True, "seed": 7, "offset": 0}


def ours(logits: Tensor, bs: int, top_k: int, top_p: float) -> Callable[[], Tensor]:
    rows = len(logits)
    filters = torch.full((bs,), top_k, dtype=torch.int32), torch.full((bs,), top_p), torch.zeros(bs)
    settings = torch.randint(1 << 40, (bs,)), torch.ones(bs), *filters
    positions, filtered = 100 + torch.arange(rows), top_k < ANY or top_p < 1
    return lambda: compiled.sample(logits, positions, *settings, filtered)


def row(bs: int, nodes: int) -> dict[str, float]:
    """Microseconds of each call."""
    rows = bs * nodes
    logits = torch.randn(rows, VOCAB) * 3
    calls: dict[str, Callable[[], Tensor]] = {}
    for name, x in (("f32", logits), ("bf16", logits.bfloat16())):
        calls[f"ours_plain_{name}"] = ours(x, bs, ANY, 1.0)
        calls[f"ours_top_p_{name}"] = ours(x, bs, ANY, TOP_P)
        calls[f"ours_top_k_p_{name}"] = ours(x, bs, TOP_K, TOP_P)
        calls[f"argmax_{name}"] = lambda x=x: x.argmax(-1)
    probs, top_k = logits.softmax(-1), torch.full((rows,), TOP_K, dtype=torch.int32)
    top_p = torch.full((rows,), TOP_P)
    calls["softmax"] = lambda: logits.softmax(-1)
    calls["flashinfer_plain"] = lambda: samplers.sampling_from_probs(probs, **SEED)
    calls["flashinfer_top_p"] = lambda: samplers.top_p_sampling_from_probs(probs, top_p, **SEED)
    calls["flashinfer_top_k_p"] = lambda: samplers.top_k_top_p_sampling_from_probs(
        probs, top_k, top_p, filter_apply_order="joint", **SEED
    )
    taken = {name: round(microseconds(call), 1) for name, call in calls.items()}
    return {"requests": bs, "nodes": nodes, "vocab": VOCAB, **taken}


def main(out: Path) -> None:
    """Write OUT, and print its rows."""
    torch.manual_seed(0)
    report = {"device": torch.cuda.get_device_name(), "torch": torch.__version__, "rows": []}
    with torch.device("cuda"), torch.inference_mode():
        for size in SIZES:
            report["rows"].append(row(*size))
            print(report["rows"][-1], flush=True)
            out.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    typer.run(main)
