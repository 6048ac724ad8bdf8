"""An SGLang plug-in for tests: puts a draft that knows the answers, or a bug, into a server that has this folder on
its PYTHONPATH. DFLASH_PLANT says which: the path of a file of known answers, "prefer the draft", "a neighbour's
settings", "any shape", or "prompts beside one".
"""

from __future__ import annotations

import dataclasses
import json
import os
import random
from functools import cache
from pathlib import Path
from typing import Any

import torch
from sglang.srt.plugins.hook_registry import HookRegistry, HookType
from sglang.srt.runtime_context import get_parallel

K = 16


def register() -> None:
    if os.environ["DFLASH_PLANT"] == "prefer the draft":
        HookRegistry.register("sglang_dflash.worker.walk", walk_preferring_the_draft, HookType.AROUND)
    elif os.environ["DFLASH_PLANT"] == "any shape":
        HookRegistry.register("sglang_dflash.budget.choice.Budget.choose", choose_any_shape, HookType.AROUND)
        HookRegistry.register("sglang_dflash.step.draft_pass.grow", grow_by_rank, HookType.AROUND)
        HookRegistry.register("sglang_dflash.step.plan.Planner.has_room", has_room_beside_one, HookType.AROUND)
    elif os.environ["DFLASH_PLANT"] == "prompts beside one":
        HookRegistry.register("sglang_dflash.step.plan.Planner.has_room", has_room_beside_one, HookType.AROUND)
    elif os.environ["DFLASH_PLANT"] == "a neighbour's settings":
        HookRegistry.register("sglang_dflash.step.sampling.settings_of", settings_of_the_next, HookType.AROUND)
    else:
        HookRegistry.register(
            "sglang_dflash.step.draft_pass.DraftRunner.draft", draft_from_answers, HookType.REPLACE
        )


def choose_any_shape(choose: Any, budget: Any, *batch: Any) -> Any:
    """Whatever pays: shapes from step to step as chance will have them, nothing at all among them."""
    choice = choose(budget, *batch)
    *_, fits = batch
    shapes = [i for i, shape in enumerate(budget.shapes) if (fits[i] if fits else len(choice.requests) <= shape.most)]
    return dataclasses.replace(choice, shape=random.SystemRandom().choice(shapes))  # another one for each rank


def has_room_beside_one(original: Any, planner: Any, requests: int, lengths: Any) -> bool:
    """Prompts are read in verify passes beside however few requests."""
    fits = planner._fits(requests, lengths)
    return any(fits[1:] or fits)


def grow_by_rank(grow: Any, lattice: Any, bonus: torch.Tensor, nodes: int) -> Any:
    """Another tree on each rank; the first rank's is the right one."""
    rolled = lattice.logp.roll(get_parallel().tp_rank, -1)
    return grow(dataclasses.replace(lattice, logp=rolled), bonus, nodes)


def settings_of_the_next(settings_of: Any, info: Any, requests: Any) -> Any:
    """The planted bug: the batch's requests are sampled under each other's settings, the first under the last one's."""
    return tuple(x.flip(0)[requests] for x in settings_of(info, slice(None)))


def walk_preferring_the_draft(walk: Any, tree: Any, sampled: torch.Tensor, limit: Any) -> Any:
    """The planted bug: at a node that has children the best one counts as sampled."""
    sampled = sampled.clone()
    for node in reversed(range(1, tree.tokens.shape[1])):  # a node's best child comes first, so is written last
        sampled.scatter_(1, tree.parents[:, node : node + 1], tree.tokens[:, node : node + 1])
    return walk(tree, sampled, limit)


@cache
def known() -> dict[tuple[int, ...], tuple[list[int], bool]]:
    """Prompt -> its answer, and whether the draft is to be right (else always wrong)."""
    rows = json.loads(Path(os.environ["DFLASH_PLANT"]).read_text())
    return {tuple(row["prompt"]): (row["answer"], i % 2 == 0) for i, row in enumerate(rows)}


def draft_from_answers(self: Any, batch: Any, window: Any, shape: Any, any_penalised: Any, foresee: Any) -> Any:
    from sglang_dflash.tree import Lattice, grow

    depth, vocab = shape.depth, self.options.draft.vocab_size
    tokens = torch.empty(len(batch.reqs), depth, K, dtype=torch.int64)
    for row, req in enumerate(batch.reqs):
        answer, right = known().get(tuple(req.origin_input_ids), ([], True))  # the server warms up with its own
        at = int(window.prefix_lens[row]) - len(req.origin_input_ids)  # the bonus token's place in the answer
        coming = (answer[at + 1 :] + [0] * depth)[:depth]
        tokens[row] = (torch.tensor(coming)[:, None] + torch.arange(K) + (not right)) % vocab
    logp = torch.full((len(batch.reqs), depth, 1, K), -9.0)
    logp[..., 0] = -0.01
    device = window.prefix_lens.device
    root = window.block_tokens[:, 0].contiguous()
    return grow(Lattice(tokens.to(device), logp.to(device)), root, shape.nodes)
