"""Time one layer's attention of a tree pass on this GPU, masked in two ways and not masked at all.

    python scripts/time_attention.py --out docs/results/gpu/attention_h200.json --page-sizes 1

- plain: FlashAttention-3, causal, no tree: what a chain of the same width and context costs
- in_one: `tree_attention`
- in_two: FlashAttention-3 over the prefix, its tiles scheduled once a pass, then `window_attention`
- served: whichever of the two a server runs (platforms/cuda/fa3.py); beside FlashInfer it is in_one
- flashinfer: its paged prefill kernel under a custom mask over prefix and window
- flashinfer_plain: the same kernel, causal, no tree

Llama-3.1-8B's heads, bfloat16. Each is timed in a CUDA graph, and all results are compared. As in a model, every call
is of another layer: keys and values come from memory. Needs sgl_kernel and flashinfer, as SGLang installs them.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Annotated

import flashinfer
import torch
import typer
from rich.console import Console
from rich.table import Table
from sgl_kernel.flash_attn import flash_attn_with_kvcache, get_scheduler_metadata
from time_ops import microseconds
from torch import Tensor

from sglang_dflash.kernels import compiled
from sglang_dflash.platforms.cuda import SHORT_PREFIX, is_narrow

HEADS, KV_HEADS, SIZE = 32, 8, 128
SCALE = SIZE**-0.5
SHAPES = [
    (bs, width, context)
    for bs, widths in ((1, (16, 32, 64)), (4, (32,)), (16, (3, 8)), (64, (3, 16)))
    for width in widths
    for context in (256, 1024, 4096, 32768)
    if bs * context <= 2**20
]
COLD = 128 * 2**20  # bytes of keys and values, of which a GPU's cache holds the lesser part
MOST_LAYERS = 32


class Pass:
    """One layer of a tree pass: bs requests of `width` tokens behind `context`, on pages of page_size slots."""

    def __init__(self, bs: int, width: int, context: int, page_size: int) -> None:
        self.bs, self.width, self.context, self.page_size = bs, width, context, page_size
        room = (context + width + page_size - 1) // page_size
        bf16 = torch.bfloat16
        layer = torch.randn(2, bs * room, page_size, KV_HEADS, SIZE).to(bf16)
        layers = max(1, min(MOST_LAYERS, COLD // layer.nbytes))
        self.layers = itertools.cycle(layer.repeat(layers, 1, 1, 1, 1, 1).unbind())
        self.pages = torch.randperm(bs * room, dtype=torch.int32).view(bs, room)
        self.q = torch.randn(bs * width, HEADS, SIZE).to(bf16)
        parents = (torch.rand(bs, width) * torch.arange(width)).long()  # any node before
        self.mask = plain_mask(parents)
        columns = context + torch.arange(width)
        self.slots = (self.pages[:, columns // page_size].long() * page_size + columns % page_size).flatten()
        self.k, self.v = layer.view(2, -1, KV_HEADS, SIZE)[:, self.slots]

    def plain(self) -> Callable[[], Tensor]:
        lens = torch.full((self.bs,), self.context + self.width, dtype=torch.int32)
        q = self.q.view(self.bs, self.width, HEADS, SIZE)

        def run() -> Tensor:
            keys, values = next(self.layers)
            return flash_attn_with_kvcache(
                q=q, k_cache=keys, v_cache=values, page_table=self.pages, cache_seqlens=lens, causal=True
            )

        return run

    def in_one(self) -> Callable[[], Tensor]:
        lens = torch.full((self.bs,), self.context, dtype=torch.int32)

        def run() -> Tensor:
            caches = next(self.layers).view(2, -1, KV_HEADS, SIZE)
            return compiled.tree_attention(
                self.q, self.k, self.v, self.mask, lens, self.pages, self.page_size, *caches, self.slots, SCALE, 0.0
            )

        return run

    def in_two(self) -> Callable[[], Tensor]:
        lens = torch.full((self.bs,), self.context, dtype=torch.int32)
        q = self.q.view(self.bs, self.width, HEADS, SIZE)
        schedule = get_scheduler_metadata(
            batch_size=self.bs, max_seqlen_q=self.width, max_seqlen_k=self.pages.shape[1] * self.page_size,
            num_heads=HEADS, num_heads_k=KV_HEADS, headdim=SIZE, cache_seqlens=lens, page_size=self.page_size,
        )  # fmt: skip

        def run() -> Tensor:
            layer = next(self.layers)
            out, lse, *_ = flash_attn_with_kvcache(
                q=q, k_cache=layer[0], v_cache=layer[1], page_table=self.pages, cache_seqlens=lens,
                causal=False, return_softmax_lse=True, scheduler_metadata=schedule,
            )  # fmt: skip
            out, caches = out.view(self.q.shape), layer.view(2, -1, KV_HEADS, SIZE)
            compiled.window_attention(
                self.q, self.k, self.v, self.mask, lse, out, *caches, self.slots, SCALE, 0.0
            )
            return out

        return run

    def flashinfer(self, masked: bool) -> Callable[[], Tensor]:
        total = self.context + self.width
        pages = (total + self.page_size - 1) // self.page_size
        indptr = torch.arange(self.bs + 1, dtype=torch.int32)
        whole = torch.cat([torch.ones(self.bs, self.width, self.context, dtype=torch.bool), self.mask], 2)
        workspace = torch.empty(256 * 2**20, dtype=torch.uint8)
        wrapper = flashinfer.BatchPrefillWithPagedKVCacheWrapper(workspace, "NHD", backend="fa2")
        wrapper.plan(
            indptr * self.width, indptr * pages, self.pages[:, :pages].flatten(),
            torch.full((self.bs,), (total - 1) % self.page_size + 1, dtype=torch.int32),
            HEADS, KV_HEADS, SIZE, self.page_size, custom_mask=whole.flatten() if masked else None, causal=not masked,
            q_data_type=torch.bfloat16,
        )  # fmt: skip
        return lambda: wrapper.run(self.q, tuple(next(self.layers)))


def plain_mask(parents: Tensor) -> Tensor:
    """[bs, w, w] bool: itself and its ancestors; parents [bs, w], each before its child."""
    bs, w = parents.shape
    mask = torch.eye(w, dtype=torch.bool).repeat(bs, 1, 1)
    for node in range(1, w):
        mask[:, node] |= mask[torch.arange(bs), parents[:, node]]
    return mask


def row(bs: int, width: int, context: int, page_size: int) -> dict[str, float]:
    one = Pass(bs, width, context, page_size)
    runs = {
        "plain": one.plain(),
        "in_one": one.in_one(),
        "in_two": one.in_two(),
        "flashinfer": one.flashinfer(masked=True),
        "flashinfer_plain": one.flashinfer(masked=False),
    }
    want = runs["flashinfer"]()
    errors = {f"error_{name}": (runs[name]() - want).abs().max().item() for name in ("in_one", "in_two")}
    times = {name: microseconds(run) for name, run in runs.items()}
    served = times["in_one" if is_narrow(width, HEADS, KV_HEADS) or context <= SHORT_PREFIX else "in_two"]
    shape = {"bs": bs, "width": width, "context": context, "page_size": page_size}
    ratios = {
        "served_to_plain": served / times["plain"],
        "in_one_to_flashinfer_plain": times["in_one"] / times["flashinfer_plain"],
    }
    return {**shape, **times, **ratios, **errors}


def main(
    out: Annotated[Path | None, typer.Option(help="where the figures go, as JSON")] = None,
    page_sizes: Annotated[str, typer.Option(help="slots of a page, comma-separated")] = "1,16,64",
) -> None:
    """Print, and write to OUT, microseconds of one layer by shape."""
    torch.manual_seed(0)
    with torch.device("cuda"), torch.inference_mode():
        rows = [row(*shape, page_size) for page_size in map(int, page_sizes.split(",")) for shape in SHAPES]
    device = torch.cuda.get_device_name()
    table = Table(*rows[0], title=f"{device}, µs of one layer")
    for values in rows:
        table.add_row(*(f"{v:.4g}" for v in values.values()))
    Console(width=140).print(table)
    if out is not None:
        versions = {"torch": torch.__version__, "flashinfer": flashinfer.__version__}
        out.write_text(json.dumps({"device": device, **versions, "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    typer.run(main)
