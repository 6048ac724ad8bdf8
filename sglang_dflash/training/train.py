"""The training loop: schedule, optimiser, moving average, checkpoints, and what it prints and plots as it goes."""

from __future__ import annotations

import json
import math
import time
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from rich.console import Console
from torch import Tensor

from sglang_dflash.training import draft as drafts
from sglang_dflash.training.data import Answers, Batch, Cursor, batches, prefetch
from sglang_dflash.training.draft import Draft, DraftShape
from sglang_dflash.training.evaluate import Result, evaluate
from sglang_dflash.training.optimizer import optimizers
from sglang_dflash.training.step import (
    Objective,
    blocks_at,
    draft_hidden,
    features,
    features_and_states,
    loss,
    mixed,
    random_anchors,
)
from sglang_dflash.training.target import Target

console = Console(soft_wrap=True, highlight=False)


@dataclass(frozen=True)
class Recipe:
    """How to train. A step sees rows x width packed tokens and rows x anchors draft blocks, on each GPU.

    The learning rate falls as a cosine over `steps`, or over `minutes` if these end sooner.
    """

    steps: int = 20000
    minutes: float = math.inf
    rows: int = 16
    width: int = 2048
    anchors: int = 128
    lr: float = 2e-3
    warmup: int = 200
    optimizer: str = "muon"
    weight_decay: float = 0.01
    clip: float = 1.0
    average: float = 0.999
    objective: Objective = field(default_factory=Objective)
    seed: int = 0
    evaluate_every: float = 90.0  # seconds
    evaluate_documents: int = 48  # a benchmark


class Training:
    """A run: what changes as it goes, and one step of it."""

    def __init__(self, target: Target, shape: DraftShape, recipe: Recipe, out: Path) -> None:
        if recipe.objective.of_distribution and shape.selector == "free":
            raise ValueError("selector 'free' learns from what was written alone: soft and variation need another one")
        torch.manual_seed(recipe.seed)
        self.target, self.recipe, self.out = target, recipe, out
        self.device = target.embedding.device
        self.draft = Draft(shape, target.config)
        self.draft.start_from(target)
        self.draft.to(self.device)
        self.average = {k: v.detach().clone() for k, v in self.draft.state_dict().items()}
        self.optimizers = optimizers(self.draft, recipe.optimizer, recipe.weight_decay)
        self.rank = dist.get_rank() if dist.is_initialized() else 0
        self.ranks = dist.get_world_size() if dist.is_initialized() else 1
        self.step, self.elapsed, self.cursor = 0, 0.0, Cursor()
        self.curve: list[dict] = []
        torch.manual_seed(recipe.seed * 1000 + self.rank)
        if self.device.type == "cuda":
            for layer in [*target.layers, *self.draft.layers]:
                layer.compile(dynamic=False)

    def begin_with(self, path: Path) -> None:
        """Take a saved draft's weights to begin with, causal or not, whatever it sees. Raises ValueError where it has
        another shape.
        """
        given, mine = drafts.load(path, self.target.config), self.draft.shape
        if replace(given.shape, causal=mine.causal, window=mine.window) != mine:
            raise ValueError(f"{path} is a draft of {given.shape}: ask for that shape, not {self.draft.shape}")
        self.draft.load_state_dict(given.state_dict())
        self.average = {k: v.detach().clone() for k, v in self.draft.state_dict().items()}

    def learning_rate(self) -> float:
        r = self.recipe
        done = min(1.0, max(self.step / r.steps, self.elapsed / 60 / r.minutes))
        return r.lr * min(1.0, (self.step + 1) / r.warmup) * (0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * done)))

    def advance(self, batch: Batch) -> Tensor:
        """One step; returns its loss, not waited for."""
        shape, objective, states = self.draft.shape, self.recipe.objective, None
        with torch.no_grad():
            if objective.of_distribution:
                context, states = features_and_states(self.target, batch, list(shape.features))
            else:
                context = features(self.target, batch, list(shape.features))
            blocks = blocks_at(batch, random_anchors(batch, self.recipe.anchors), shape.block)
        with mixed(self.target):
            hidden = draft_hidden(self.draft, self.target, batch, blocks.anchors, context)
            value = loss(self.draft, self.target, batch, blocks, hidden, objective, states)
        value.backward()
        parameters = list(self.draft.parameters())
        if self.ranks > 1:
            mean_gradients(parameters, self.ranks)
        torch.nn.utils.clip_grad_norm_(parameters, self.recipe.clip)
        lr = self.learning_rate()
        for optimizer in self.optimizers:
            for group in optimizer.param_groups:
                group["lr"] = lr
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        decay = min(self.recipe.average, (1 + self.step) / (10 + self.step))
        torch._foreach_lerp_(list(self.average.values()), list(self.draft.state_dict().values()), 1 - decay)
        self.step += 1
        return value.detach()

    def averaged(self) -> Draft:
        """The draft of the moving average, which is what is evaluated and shipped."""
        draft = Draft(self.draft.shape, self.target.config).to(self.device)
        draft.load_state_dict(self.average)
        return draft.eval()

    def save(self) -> None:
        if self.rank:
            return
        state = {
            "draft": self.draft.state_dict(),
            "average": self.average,
            "optimizers": [o.state_dict() for o in self.optimizers],
            "step": self.step,
            "elapsed": self.elapsed,
            "cursor": asdict(self.cursor),
            "curve": self.curve,
        }
        torch.save(state, self.out / "state.partial")
        (self.out / "state.partial").rename(self.out / "state.pt")
        drafts.save(self.draft, self.average, self.out / "draft")
        (self.out / "curve.json").write_text(json.dumps(self.curve, indent=1) + "\n")

    def resume(self) -> None:
        """Go on from state.pt. Every rank draws from the data where rank 0 stood."""
        state = torch.load(self.out / "state.pt", map_location=self.device)
        self.draft.load_state_dict(state["draft"])
        self.average, self.curve = state["average"], state["curve"]
        for optimizer, saved in zip(self.optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict(saved)
        self.step, self.elapsed, self.cursor = state["step"], state["elapsed"], Cursor(**state["cursor"])
        torch.manual_seed(self.recipe.seed * 1000 + self.rank + self.step)


def mean_gradients(parameters: list[torch.nn.Parameter], ranks: int) -> None:
    """Every rank's gradients become their mean, in one exchange."""
    grads = [p.grad for p in parameters if p.grad is not None]
    flat = torch.cat([g.flatten() for g in grads])
    dist.all_reduce(flat)
    flat /= ranks
    for grad, part in zip(grads, flat.split([g.numel() for g in grads]), strict=True):
        grad.copy_(part.view_as(grad))


def few(answers: Answers, count: int) -> np.ndarray:
    """Up to `count` documents of each source, spread evenly."""
    picked = []
    for source in range(len(answers.sources)):
        mine = np.nonzero(answers.source == source)[0]
        picked.append(mine[np.linspace(0, len(mine) - 1, min(count, len(mine))).astype(int)])
    return np.concatenate(picked)


def train(training: Training, data: Answers, held_out: Answers) -> Result:
    """Run to the end of the recipe; evaluate, save and print as it goes. Returns the last evaluation, of everything."""
    recipe, t = training.recipe, training
    source = batches(data, recipe.rows, recipe.width, recipe.seed, t.cursor, t.rank, t.ranks)
    ready = prefetch(source)
    begin = said = evaluated = time.monotonic() - t.elapsed
    losses: list[Tensor] = []
    mean = 0.0
    while t.step < recipe.steps and t.elapsed < recipe.minutes * 60:
        batch, t.cursor = next(ready)
        losses.append(t.advance(batch.to(t.device)))
        if t.step % 50 == 0 or t.step == 1:
            mean = torch.stack(losses).mean().item()  # waits for the device
            now, losses = time.monotonic(), []
            t.elapsed = agreed(now - begin, t)
            if t.rank == 0 and now - said > 5:
                tokens = t.step * recipe.rows * recipe.width * t.ranks
                console.print(
                    f"step {t.step} {t.elapsed:.0f}s loss {mean:.3f} lr {t.learning_rate():.1e} "
                    f"epoch {t.cursor.epoch} {tokens / t.elapsed:,.0f} tokens/s"
                )
                said = now
            if t.elapsed - (evaluated - begin) > recipe.evaluate_every:
                note(t, held_out, few(held_out, recipe.evaluate_documents), mean)
                t.save()
                evaluated = begin + t.elapsed
    t.save()  # what is trained is safe before everything is evaluated
    result = note(t, held_out, np.arange(len(held_out)), mean)
    t.save()
    return result


def agreed(elapsed: float, t: Training) -> float:
    """Rank 0's clock, so that every rank stops and evaluates at the same step."""
    if t.ranks == 1:
        return elapsed
    shared = torch.tensor(elapsed, device=t.device, dtype=torch.float64)
    dist.broadcast(shared, 0)
    return float(shared)


def note(t: Training, held_out: Answers, documents: np.ndarray, mean: float) -> Result:
    """Evaluate on rank 0, print, add to the learning curve and plot it."""
    if t.rank:
        return {}
    result = evaluate(t.averaged(), t.target, held_out, documents, t.recipe.rows, t.recipe.width)
    tokens = t.step * t.recipe.rows * t.recipe.width * t.ranks
    t.curve.append({"step": t.step, "seconds": round(t.elapsed), "tokens": tokens, "loss": mean, "accept": result})
    for name, numbers in result.items():
        console.print(f"  {name}: " + " ".join(f"{k} {v}" for k, v in numbers.items()))
    plot(t.curve, t.out / "curve.png")
    return result


def plot(curve: list[dict], path: Path) -> None:
    """Accept length of the chain and the tree of 31 nodes by tokens seen."""
    from matplotlib.figure import Figure

    axes = (figure := Figure(figsize=(7, 4))).add_subplot()
    for name in curve[-1]["accept"]:
        for key, style in (("chain", "--"), ("tree31", "-")):
            points = [(p["tokens"] / 1e6, p["accept"][name][key]) for p in curve if name in p["accept"]]
            axes.plot(*zip(*points, strict=True), style, label=f"{name} {key}")
    axes.set(xlabel="tokens seen (million)", ylabel="held-out accept length")
    axes.legend(fontsize="small")
    figure.savefig(path, dpi=120)
