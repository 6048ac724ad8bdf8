"""How a greedy answer came about, step by step: what was drafted, what of it the target took, and where the two parted.

The answer and the target's probabilities are transformers'; what is drafted comes from the network as it is trained.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sglang_dflash.training import draft as drafts
from sglang_dflash.training.data import Batch
from sglang_dflash.training.evaluate import lattice, walk_gold
from sglang_dflash.training.step import draft_hidden, features
from sglang_dflash.training.target import Target
from sglang_dflash.tree import DraftTree, Lattice, grow


@dataclass(frozen=True)
class Node:
    """A drafted token. parent: its index in the step's nodes, -1 for the bonus token. p: given the path before it."""

    token: int
    parent: int
    depth: int
    p: float
    accepted: bool


@dataclass(frozen=True)
class Candidate:
    """A token that the draft considered behind the last accepted one. drafted: it became a node."""

    token: int
    draft_p: float
    target_p: float
    drafted: bool


@dataclass(frozen=True)
class Step:
    """One verify step. at: place of its bonus token in the answer. emitted: answer tokens that it gave.

    own, own_p: the target's token behind the last accepted one, and its probability; None where the answer ended
    within the tree. candidates: the draft's behind the last accepted token, best first, none behind a path of full
    depth. rank: place of `own` among them, from 1; None where it is not among them.
    """

    at: int
    bonus: int
    nodes: list[Node]
    accepted: int
    emitted: int
    own: int | None
    own_p: float | None
    candidates: list[Candidate]
    rank: int | None

    @property
    def why(self) -> str:
        """Why the step ended where it did."""
        if self.own is None:
            return "the answer ended"
        if not self.candidates:
            return "full depth accepted"
        if self.rank is None:
            return "not among the candidates"
        return "a candidate, but not in the tree"


@dataclass(frozen=True)
class Explanation:
    """A greedy answer's steps. target_p: the target's probability of each token of the answer."""

    answer: list[int]
    target_p: list[float]
    steps: list[Step]
    nodes: int
    depth: int
    top_k: int

    @property
    def accept_length(self) -> float | None:
        """Tokens a step, the answer's first token aside, which the prefill gives; None where that was all."""
        return (len(self.answer) - 1) / len(self.steps) if self.steps else None

    def accepted_at(self) -> list[int]:
        """How many steps accepted a draft token at each depth, from 1."""
        return [sum(step.accepted >= depth for step in self.steps) for depth in range(1, self.depth + 1)]


@torch.inference_mode()
def greedy(target: Path, prompt: list[int], max_tokens: int) -> tuple[list[int], Tensor]:
    """The target's greedy answer with the token that ends it, and its log-probabilities at each token, [tokens, V]."""
    from transformers import AutoModelForCausalLM, GenerationConfig  # seconds to import

    model: Any = AutoModelForCausalLM.from_pretrained(target, dtype=torch.float32).eval()
    # The checkpoint's own settings sample or penalise; of them only what ends an answer is kept.
    config = GenerationConfig(
        max_new_tokens=max_tokens, eos_token_id=model.generation_config.eos_token_id, pad_token_id=0,
        output_logits=True, return_dict_in_generate=True,
    )  # fmt: skip
    ids = torch.tensor([prompt])
    out = model.generate(ids, attention_mask=torch.ones_like(ids), generation_config=config)
    return out.sequences[0, len(prompt) :].tolist(), torch.cat(out.logits).log_softmax(-1)


@torch.inference_mode()
def explain(
    target: Path, draft: Path, prompt: list[int], max_tokens: int, nodes: int, depth: int | None
) -> Explanation:
    """Follow the target's greedy answer to `prompt` as a server would. depth None: as servers choose it.

    Raises ValueError for a target that is not Llama- or Qwen-shaped, a draft of another kind than training makes, and a
    depth that the draft does not reach.
    """
    drafter = read_draft(draft, target)
    depth = drafted_depth(depth, nodes, drafter.shape.block)
    answer, logp = greedy(target, prompt, max_tokens)
    model = Target.load(target, "cpu", torch.float32)
    tokens = torch.tensor([prompt + answer])
    batch = Batch(tokens, torch.zeros_like(tokens), torch.ones_like(tokens, dtype=torch.bool), torch.zeros_like(tokens))
    context = features(model, batch, list(drafter.shape.features))
    steps, at = [], 0
    while at + 1 < len(answer):
        bonus = torch.tensor([answer[at]])
        hidden = draft_hidden(drafter, model, batch, torch.tensor([[len(prompt) + at]]), context)[0, :, :depth]
        drafted = lattice(drafter, model, hidden, bonus)
        steps.append(one_step(drafted, grow(drafted, bonus, nodes), at, answer, logp))
        at += steps[-1].emitted
    target_p = logp.gather(1, torch.tensor(answer)[:, None])[:, 0].exp().tolist()
    return Explanation(answer, target_p, steps, nodes, depth, drafter.shape.candidates)


def read_draft(draft: Path, target: Path) -> drafts.Draft:
    """The draft. Raises ValueError for one that training does not make."""
    try:
        return drafts.load(draft, json.loads((target / "config.json").read_text())).eval()
    except (KeyError, RuntimeError) as error:
        raise ValueError(
            f"{draft} is no draft of the kinds that training makes for {target} ({error}): give one that "
            "scripts/train_draft.py could have made, and the target it was made for"
        ) from error


def drafted_depth(depth: int | None, nodes: int, block: int) -> int:
    """The depth asked for, or servers' default. Raises ValueError for one that a block of the draft does not hold."""
    from sglang_dflash.arguments import usual_depth

    if depth is None:
        return usual_depth(nodes, block - 1)
    if depth >= block:
        raise ValueError(f"a depth of {depth} is asked of a draft with blocks of {block}: give at most {block - 1}")
    return depth


def one_step(drafted: Lattice, tree: DraftTree, at: int, answer: list[int], logp: Tensor) -> Step:
    """The step behind token `at` of the answer, from what was drafted there and the tree grown in it."""
    gold = torch.full((1, drafted.depth), -1)
    rest = answer[at + 1 :][: drafted.depth]
    gold[0, : len(rest)] = torch.tensor(rest)
    walked, lens = walk_gold(tree, gold)
    accepted = int(lens) - 1
    path = walked[0, : accepted + 1].tolist()
    parents, conditional = tree.parents[0], (tree.logp[0] - tree.logp[0][tree.parents[0]]).exp()
    nodes = [
        Node(int(tree.tokens[0, i]), int(parents[i]) - 1, int(tree.depths[0, i]), float(conditional[i]), i in path)
        for i in range(1, tree.tokens.shape[1])
    ]
    ends = at + accepted + 1 == len(answer)
    own = None if ends else answer[at + accepted + 1]
    there = None if ends else logp[at + accepted + 1].exp()
    candidates: list[Candidate] = []
    if there is not None and accepted < drafted.depth:
        children = {n.token for n in nodes if n.parent == path[-1] - 1}
        candidates = offered(drafted, accepted, int(tree.tokens[0, path[-1]]), children, there)
    rank = next((i for i, c in enumerate(candidates, 1) if c.token == own), None)
    return Step(
        at, answer[at], nodes, accepted, accepted + (not ends),
        own, None if there is None else float(there[own]), candidates, rank,
    )  # fmt: skip


def offered(drafted: Lattice, depth: int, before: int, children: set[int], there: Tensor) -> list[Candidate]:
    """All candidates one below `depth`, behind token `before` of that depth. there [V]: the target's probabilities."""
    row = drafted.tokens[0, depth - 1].tolist().index(before) if depth and drafted.logp.shape[2] > 1 else 0
    tokens, p = drafted.tokens[0, depth].tolist(), drafted.logp[0, depth, row].exp().tolist()
    made = [Candidate(t, q, float(there[t]), t in children) for t, q in zip(tokens, p, strict=True)]
    return sorted(made, key=lambda c: -c.draft_p)
