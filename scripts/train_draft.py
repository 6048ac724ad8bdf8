"""Train a draft for a target on its own answers.

    python scripts/train_draft.py TARGET data/ held-out/ out/
    torchrun --nproc-per-node 2 scripts/train_draft.py TARGET data/ held-out/ out/

out/draft is a checkpoint that a server loads; out/curve.json and out/curve.png say what it accepted on the way.
"""

from __future__ import annotations

import math
import os
from pathlib import Path
from typing import Annotated

import torch
import torch.distributed as dist
import typer

from sglang_dflash.training import draft as drafts
from sglang_dflash.training.data import Answers
from sglang_dflash.training.draft import DraftShape
from sglang_dflash.training.step import Objective
from sglang_dflash.training.target import Target
from sglang_dflash.training.throughput import matmul_share
from sglang_dflash.training.train import Recipe, Training, console, train


def main(
    target: Annotated[Path, typer.Argument(help="the target's checkpoint directory")],
    data: Annotated[Path, typer.Argument(help="what make_data.py made")],
    held_out: Annotated[Path, typer.Argument(help="greedy answers to held-out prompts (make_data.py --answers-only)")],
    out: Annotated[Path, typer.Argument(help="where draft, curve and state go")],
    layers: int = DraftShape.layers,
    features: Annotated[str, typer.Option(help="target layers read, comma-separated")] = "1,14,27",
    block: int = DraftShape.block,
    intermediate: int = DraftShape.intermediate,
    causal: bool = DraftShape.causal,
    selector: Annotated[str, typer.Option(help="none, tied or free")] = DraftShape.selector,
    rank: int = DraftShape.rank,
    window: Annotated[
        int, typer.Option(help="last tokens of the context that the draft sees; 0: as many as the data's longest has")
    ] = DraftShape.window,
    weights: Annotated[str, typer.Option(help="of positions: static or dpace")] = Objective.weights,
    soft: Annotated[
        float, typer.Option(help="share of a label that is the target's distribution, the written token being the rest")
    ] = Objective.soft,
    variation: Annotated[
        float, typer.Option(help="weight of the total variation between draft and target")
    ] = Objective.variation,
    optimizer: Annotated[str, typer.Option(help="muon or adamw")] = Recipe.optimizer,
    lr: float = Recipe.lr,
    steps: int = Recipe.steps,
    minutes: float = math.inf,
    rows: int = Recipe.rows,
    width: int = Recipe.width,
    anchors: int = Recipe.anchors,
    evaluate_every: Annotated[float, typer.Option(help="seconds")] = Recipe.evaluate_every,
    documents: Annotated[int, typer.Option(help="a benchmark, evaluated on the way")] = Recipe.evaluate_documents,
    begin: Annotated[Path | None, typer.Option(help="a draft of the same shape to begin with")] = None,
    resume: Annotated[bool, typer.Option(help="go on from OUT/state.pt")] = False,
    share: Annotated[bool, typer.Option(help="first measure the share of a plain matmul loop's speed")] = False,
    seed: int = 0,
) -> None:
    """Train a draft for TARGET on DATA, evaluated on HELD_OUT."""
    device = start()
    cuda = device.type == "cuda"
    torch.set_float32_matmul_precision("high")
    model = Target.load(target, device, torch.bfloat16 if cuda else torch.float32)
    layer_ids = tuple(int(i) for i in features.split(","))
    answers = Answers(data)
    window = window or min(answers.longest, width)  # further than it was trained to see, a draft had better not look
    shape = DraftShape(layers, layer_ids, block, intermediate, causal, selector, rank, window=window)
    recipe = Recipe(
        steps=steps, minutes=minutes, rows=rows, width=width, anchors=anchors, lr=lr, optimizer=optimizer,
        objective=Objective(weights, soft=soft, variation=variation), seed=seed, evaluate_every=evaluate_every,
        evaluate_documents=documents,
    )  # fmt: skip
    out.mkdir(parents=True, exist_ok=True)
    training = Training(model, shape, recipe, out)
    if begin:
        training.begin_with(begin)
    if resume:
        training.resume()
    if training.rank == 0:
        parameters = sum(p.numel() for p in training.draft.parameters())
        console.print(f"{drafts.describe(shape)}: {parameters / 1e6:.2f} million parameters")
    if share:
        matmul_share(training, answers)
    train(training, answers, Answers(held_out))
    if dist.is_initialized():
        dist.barrier()
        dist.destroy_process_group()


def start() -> torch.device:
    """This process's device; under torchrun, the process group too."""
    cuda = torch.cuda.is_available()
    rank = int(os.environ.get("LOCAL_RANK", 0))
    if "WORLD_SIZE" in os.environ:
        dist.init_process_group("nccl" if cuda else "gloo")
    if cuda:
        torch.cuda.set_device(rank)
    return torch.device("cuda", rank) if cuda else torch.device("cpu")


if __name__ == "__main__":
    typer.run(main)
