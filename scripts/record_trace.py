"""What trees would have accepted at every token of the target's own answers, for simulate_budget.py; no server.

usage: record_trace.py TARGET DRAFT TRACE.npz [--answers 24] [--tokens 128]

Questions of each benchmark that ships with the package are answered greedily and at temperature 1. At each token of
an answer the draft grows its largest tree, which is walked along the answer as it goes on. Text is the target's own
whatever is drafted: so whatever a policy drafts, and wherever its steps begin, what it accepts is known exactly.

TRACE.npz, A answers, P drafted positions, 31 nodes, 15 deep:
  groups [A] str: benchmark and temperature; starts [A + 1]: an answer's positions
  nodes [P, 15] uint8: the walked node at each depth, in the order nodes were grown in; 0 behind the last
  logp [P, 32] float16, depths [P, 32] uint8: path log-probabilities and depths of the nodes, the root first
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

from sglang_dflash.cli.load import chat_ids, questions
from sglang_dflash.training import draft as drafts
from sglang_dflash.training.data import Batch
from sglang_dflash.training.evaluate import lattice
from sglang_dflash.training.step import blocks_at, draft_hidden, features
from sglang_dflash.training.target import Target
from sglang_dflash.tree import grow, walk

BENCHMARKS = ("gsm8k", "chat", "code")
TEMPERATURES = (0, 1)
NODES, DEPTH = 31, 15
AT_ONCE = 8  # answers that are generated together


def answers(model: Any, prompts: list[list[int]], tokens: int, temperature: int, end: int) -> list[list[int]]:
    """The target's own answers, up to their ends."""
    longest = max(map(len, prompts))
    ids = torch.tensor([[0] * (longest - len(p)) + p for p in prompts])
    there = torch.tensor([[0] * (longest - len(p)) + [1] * len(p) for p in prompts])
    sampling = {"do_sample": True, "temperature": 1.0, "top_k": 0} if temperature else {"do_sample": False}
    out = model.generate(ids, attention_mask=there, max_new_tokens=tokens, pad_token_id=0, **sampling)
    whole = [row[longest:].tolist() for row in out]
    return [answer[: answer.index(end) + 1] if end in answer else answer for answer in whole]


def positions(draft: drafts.Draft, target: Target, prompt: list[int], answer: list[int]) -> dict[str, Tensor]:
    """nodes, logp and depths of an answer's tokens but the last, as in TRACE.npz."""
    tokens = torch.tensor([prompt + answer])
    nothing = torch.zeros_like(tokens)
    batch = Batch(tokens, nothing, torch.arange(tokens.shape[1])[None] >= len(prompt), nothing)
    anchors = torch.arange(len(prompt), tokens.shape[1] - 1)[None]
    context = features(target, batch, list(draft.shape.features))
    hidden = draft_hidden(draft, target, batch, anchors, context)[0]
    tree = grow(lattice(draft, target, hidden[:, :DEPTH], tokens[0, anchors[0]]), tokens[0, anchors[0]], NODES)
    blocks = blocks_at(batch, anchors, DEPTH + 2)
    coming = blocks.gold[0].masked_fill(~blocks.valid[0], -1)
    walked = walk(tree, coming.gather(1, tree.depths))
    nodes = walked.nodes.masked_fill(torch.arange(DEPTH + 1) >= walked.lens[:, None], 0)[:, 1:]
    return {"nodes": nodes.to(torch.uint8), "logp": tree.logp.half(), "depths": tree.depths.to(torch.uint8)}


@torch.inference_mode()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("target", type=Path)
    parser.add_argument("draft", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--answers", type=int, default=24, help="of each benchmark and temperature")
    parser.add_argument("--tokens", type=int, default=128, help="of an answer at most")
    args = parser.parse_args()
    torch.manual_seed(0)
    model: Any = AutoModelForCausalLM.from_pretrained(args.target, dtype=torch.float32).eval()
    tokenizer, target = AutoTokenizer.from_pretrained(args.target), Target.load(args.target, "cpu", torch.float32)
    draft = drafts.load(args.draft, target.config).eval()
    groups, starts, parts = [], [0], []
    for benchmark in BENCHMARKS:
        prompts = [chat_ids(tokenizer, question) for question in questions(benchmark, args.answers)]
        for temperature in TEMPERATURES:
            for first in range(0, len(prompts), AT_ONCE):
                some = prompts[first : first + AT_ONCE]
                said = answers(model, some, args.tokens, temperature, tokenizer.eos_token_id)
                for prompt, answer in zip(some, said, strict=True):
                    if len(answer) < 2:
                        continue
                    groups.append(f"{benchmark} {temperature}")
                    parts.append(positions(draft, target, prompt, answer))
                    starts.append(starts[-1] + len(parts[-1]["nodes"]))
            print(f"{benchmark} {temperature}: {starts[-1]} positions by now", file=sys.stderr, flush=True)
            whole = {name: torch.cat([part[name] for part in parts]).numpy() for name in parts[0]}
            np.savez_compressed(args.out, groups=groups, starts=starts, **whole)


if __name__ == "__main__":
    main()
