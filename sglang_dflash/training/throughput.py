"""How near a training step is to a plain loop over its matrix products."""

from __future__ import annotations

import time

import torch

from sglang_dflash.training.data import Answers, Cursor, batches
from sglang_dflash.training.loss import static_weights
from sglang_dflash.training.train import Training, console

Product = tuple[int, int, int, int]
"""rows, inner, columns, how many a step"""


def products(t: Training) -> list[Product]:
    """The matrix products of one training step under static weights (those of the selector, under 1%, left out)."""
    shape, config, recipe = t.draft.shape, t.target.config, t.recipe
    context = recipe.rows * recipe.width
    queries = recipe.rows * recipe.anchors * shape.block
    hidden, vocab, inter = config["hidden_size"], config["vocab_size"], config["intermediate_size"]
    heads, kv = (
        config[k] * t.draft.layers[0].self_attn.head_dim for k in ("num_attention_heads", "num_key_value_heads")
    )
    soft = recipe.objective.of_distribution  # then the target's last layers run, and its head
    frozen = config["num_hidden_layers"] if soft else shape.features[-1] + 1
    drawn = int(
        recipe.rows * recipe.anchors * (shape.block - 1)
        * static_weights(shape.block - 1, shape.block, t.device).mean()
    )  # fmt: skip
    rows_of_head = drawn * (1 if shape.selector == "none" else 1.5)
    both = context + queries
    return [
        (context, hidden, heads + 2 * kv, frozen),
        (context, heads, hidden, frozen),
        (context, hidden, 2 * inter, frozen),
        (context, inter, hidden, frozen),
        (context, len(shape.features) * hidden, hidden, 2),  # the features need no gradient
        (both, hidden, kv, 2 * 3 * shape.layers),
        (queries, hidden, heads, 3 * shape.layers),
        (queries, heads, hidden, 3 * shape.layers),
        (queries, hidden, shape.intermediate, 2 * 3 * shape.layers),
        (queries, shape.intermediate, hidden, 3 * shape.layers),
        (int(rows_of_head), hidden, vocab, 3 if soft else 2),  # the head is frozen: no gradient of its own
    ]


def seconds(run, repeats: int) -> float:  # type: ignore[no-untyped-def]
    """Wall time of one run, after two that do not count."""
    for _ in range(2):
        run()
    torch.cuda.synchronize()
    begin = time.perf_counter()
    for _ in range(repeats):
        run()
    torch.cuda.synchronize()
    return (time.perf_counter() - begin) / repeats


def matmul_share(t: Training, data: Answers) -> float:
    """Print and return the time of the step's bare products over the time of the step. Takes 40 training steps."""
    if t.device.type != "cuda":
        raise ValueError("the share of peak is measured on a GPU only")
    shapes = products(t)
    pairs = [
        (torch.randn(m, k, device=t.device, dtype=torch.bfloat16), torch.randn(k, n, device=t.device).bfloat16(), count)
        for m, k, n, count in shapes
    ]

    def loop() -> None:
        for a, b, count in pairs:
            for _ in range(count):
                torch.mm(a, b)

    bare = seconds(loop, 5)
    pairs.clear()
    source = batches(data, t.recipe.rows, t.recipe.width, 1, Cursor(), t.rank, t.ranks)
    ready = [next(source)[0].to(t.device) for _ in range(8)]
    state = iter(range(10**9))
    step = seconds(lambda: t.advance(ready[next(state) % len(ready)]), 38)
    work = sum(2 * m * k * n * count for m, k, n, count in shapes)
    console.print(
        f"step {step * 1e3:.1f} ms, its products alone {bare * 1e3:.1f} ms: share {bare / step:.0%}; "
        f"{work / step / 1e12:.0f} of {work / bare / 1e12:.0f} TFLOP/s; "
        f"{t.recipe.rows * t.recipe.width * t.ranks / step:,.0f} tokens/s"
    )
    return bare / step
