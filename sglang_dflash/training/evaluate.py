"""Held-out accept length, offline: the draft at every position of the target's own greedy answers.

The answer is the target's, so a draft is accepted as far as it agrees with it: what a server would accept, exactly, up
to rounding. Two numbers a benchmark: the mean over positions with a whole block of answer before them, and `served`,
where each step begins where the one before ended, as a server goes.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from sglang_dflash import kernels
from sglang_dflash.training.data import Answers, Batch, pack
from sglang_dflash.training.draft import Draft
from sglang_dflash.training.step import Blocks, blocks_at, draft_hidden, features, mixed
from sglang_dflash.training.target import Target
from sglang_dflash.tree import Lattice, grow, grow_chain, walk

TREES = (3, 7, 15, 31, 63)
AT_ONCE = 512  # blocks whose logits stand in memory together
ANCHORS = 128  # a row and draft pass: as many as training draws, so that its compiled mask serves here too

Result = dict[str, dict[str, float]]
"""benchmark -> {"chain": .., "tree3": .., .., "served_chain": .., "served_tree3": ..}"""


def lattice(draft: Draft, target: Target, hidden: Tensor, bonus: Tensor) -> Lattice:
    """What the draft says after bonus [N], from hidden [N, depth, H]: K candidates a position and their transitions."""
    n, depth, _ = hidden.shape
    logits = F.linear(hidden.to(target.head.dtype), target.head).flatten(0, 1)
    unary, tokens, lse = (t.unflatten(0, (n, depth)) for t in kernels.topk_lse(logits, draft.shape.candidates))
    selector = draft.candidate_selector
    if selector is None:
        return Lattice(tokens, kernels.lattice_logp(unary, lse, None))
    gate = selector.hidden_projection(hidden.float())
    return Lattice(tokens, kernels.selector_logp(unary, lse, tokens, bonus, gate, *selector.codebooks(target)))


def accepted(lattice: Lattice, bonus: Tensor, gold: Tensor) -> Tensor:
    """Tokens a step emits (accepted and the free one), [N, 1 + len(TREES)] int64: the chain, then each tree of TREES.

    gold [N, depth] int64, -1 where there is none.
    """
    chain = walk_gold(grow_chain(lattice, bonus, lattice.depth), gold)[1]
    nodes, lens = walk_gold(grow(lattice, bonus, max(TREES)), gold)
    walked = torch.arange(nodes.shape[1], device=nodes.device) < lens[:, None]
    return torch.stack([chain.long(), *((walked & (nodes <= n)).sum(1) for n in TREES)], dim=1)


def walk_gold(tree, gold: Tensor) -> tuple[Tensor, Tensor]:  # type: ignore[no-untyped-def]
    """nodes and lens of a walk of which the answer is gold."""
    gold = F.pad(gold, (0, 1), value=-1)
    walked = walk(tree, gold.gather(1, tree.depths))
    return walked.nodes, walked.lens


@torch.no_grad()
def every_position(draft: Draft, target: Target, batch: Batch) -> Iterator[tuple[Tensor, Blocks, Tensor]]:
    """(rows [N], blocks with [N, ..] fields, emitted [N, 1 + len(TREES)]) over all answer tokens of a batch."""
    context = features(target, batch, list(draft.shape.features))
    counts = batch.answer.sum(1)
    order = (~batch.answer).long().argsort(dim=1, stable=True)  # answer positions first, in order
    for first in range(0, int(counts.max()), ANCHORS):
        anchors = order[:, first : first + ANCHORS]
        anchors = F.pad(anchors, (0, ANCHORS - anchors.shape[1]))
        blocks = blocks_at(batch, anchors, draft.shape.block)
        with mixed(target):
            hidden = draft_hidden(draft, target, batch, anchors, context)
        live = torch.arange(first, first + ANCHORS, device=counts.device) < counts[:, None]
        rows = live.nonzero()[:, 0]
        mine = Blocks(anchors[live], blocks.gold[live], blocks.valid[live])
        bonus, states = batch.tokens.gather(1, anchors)[live], hidden[live]
        gold = mine.gold.masked_fill(~mine.valid, -1)
        out = [
            accepted(lattice(draft, target, h, t), t, g)
            for h, t, g in zip(states.split(AT_ONCE), bonus.split(AT_ONCE), gold.split(AT_ONCE), strict=True)
        ]
        if out:
            yield rows, mine, torch.cat(out)


def served(emitted: np.ndarray) -> tuple[int, np.ndarray]:
    """Tokens after the first of an answer, and the steps to emit them, by column. emitted [answer tokens, columns]."""
    size, columns = emitted.shape
    steps = np.zeros(columns, dtype=np.int64)
    for column in range(columns):
        at = 0
        while at < size - 1:
            at += int(emitted[at, column])
            steps[column] += 1
    return size - 1, steps


@torch.no_grad()
def evaluate(draft: Draft, target: Target, answers: Answers, documents: np.ndarray, rows: int, width: int) -> Result:
    """Accept lengths of the given documents, each of one answer, by source."""
    names = ["chain", *(f"tree{n}" for n in TREES)]
    whole: dict[str, list[np.ndarray]] = defaultdict(list)
    tokens: dict[str, int] = defaultdict(int)
    steps: dict[str, np.ndarray] = defaultdict(lambda: np.zeros(len(names), dtype=np.int64))
    at, device = 0, target.embedding.device
    while at < len(documents):
        batch, used = pack(answers, documents[at:], rows, width)
        at += used
        batch = batch.to(device)
        per_document: dict[int, list[np.ndarray]] = defaultdict(list)
        for where, blocks, emitted in every_position(draft, target, batch):
            which = batch.document[where, blocks.anchors].tolist()
            is_whole, got = blocks.valid.all(-1).tolist(), emitted.cpu().numpy()
            for document, full, row in zip(which, is_whole, got, strict=True):
                per_document[document].append(row)
                if full:
                    whole[answers.sources[answers.source[document]]].append(row)
        for document, emits in per_document.items():
            source = answers.sources[answers.source[document]]
            size, count = served(np.stack(emits))
            tokens[source] += size
            steps[source] += count
    return {
        source: dict(zip(names, np.stack(emits).mean(0).round(3).tolist(), strict=True))
        | {f"served_{n}": round(tokens[source] / s, 3) for n, s in zip(names, steps[source].tolist(), strict=True)}
        for source, emits in sorted(whole.items())
    }
