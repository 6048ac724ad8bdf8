"""What a step's masks and penalties take on the host: no server, no GPU.

    python scripts/time_host.py docs/results/host.json

Masks: the embedded target's tokenizer; trees along a text that the grammar takes, half of whose nodes are what comes
next and half other tokens of the text; each request stands elsewhere in it. Beside all requests' masks together (those
of xgrammar that take long on several cores, where there are more than two) the same made request by request.
Penalties: asking whether there are any, penalising the logits of the draft and of the tree, and counting what was
emitted, all on one thread of a CPU; on a GPU each of the last three is a launch, the first of them in the draft's
graph.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import statistics
import time
from array import array
from importlib.metadata import version
from itertools import pairwise, product
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch

TEXT = '{"answer": 42, "unit": "%s and pears and other fruits"}'
VOCAB, EOS = 49152, 0
NODES, DEPTH = 16, 7  # of the trees that are penalised
STEPS = 24


def grammars() -> dict[str, tuple[str, str, str]]:
    """By name: what SGLang calls its kind, what describes it, and a text that it takes."""

    def schema(**unit: Any) -> str:
        properties = {"answer": {"type": "integer"}, "unit": {"type": "string", **unit}}
        return json.dumps({"type": "object", "properties": properties, "required": list(properties)})

    long = TEXT % "apples"
    return {
        "any object": ("json", '{"type": "object"}', long),
        "schema": ("json", schema(), long),
        "schema, maxLength 200": ("json", schema(maxLength=200), long),
        "schema, maxLength 12": ("json", schema(maxLength=12), '{"answer": 42, "unit": "apples, red"}'),
        "regex": ("regex", r'\{"answer": \d+, "unit": "[a-z ,]{5,200}"\}', long),
    }


def a_tree(text: list[int], at: int, nodes: int, rng: random.Random) -> tuple[list[int], list[int]]:
    """Tokens and parents below a root that stands before text[at]."""
    tokens, parents, places = [EOS], [0], [at]
    children: set[tuple[int, int]] = set()
    while len(tokens) < nodes:
        parent = rng.randrange(max(0, len(tokens) - 8), len(tokens))
        follows = places[parent] < len(text) and (parent, text[places[parent]]) not in children
        token = text[places[parent]] if follows else rng.choice(text) + rng.randrange(2)
        if (parent, token) not in children:
            children.add((parent, token))
            tokens.append(token)
            parents.append(parent)
            places.append(places[parent] + 1 if follows else len(text))
    return tokens, parents


def masks_row(template: Any, text: list[int], requests: int, nodes: int) -> dict[str, float]:
    """Milliseconds a step, the mean over a text; masks: of one request's tree."""
    from sglang_dflash.step.grammar import fill_masks

    rng, made, together, singly = random.Random(0), 0, 0.0, 0.0
    for step in range(STEPS):
        batch, trees = [], []
        for request in range(requests):
            at = (step * len(text) // STEPS + request) % len(text)
            batch.append(template.copy())
            for token in text[:at]:
                batch[-1].accept_token(token)
            trees.append(a_tree(text, at, nodes, rng))
        tokens, parents = ([tree[i] for tree in trees] for i in (0, 1))
        masks = batch[0].allocate_vocab_mask(VOCAB, requests * nodes, "cpu")
        begun = time.perf_counter()
        made += len(fill_masks(batch, list(range(requests)), tokens, parents, masks)[0])
        between = time.perf_counter()
        for row, grammar in enumerate(batch):
            fill_masks([grammar], [0], [tokens[row]], [parents[row]], masks[row * nodes : (row + 1) * nodes])
        together, singly = together + between - begun, singly + time.perf_counter() - between
    of_step = [round(1e3 * seconds / STEPS, 3) for seconds in (together, singly)]
    return {"masks": round(made / STEPS / requests, 1), "ms": of_step[0], "singly_ms": of_step[1]}


def penalties_row(requests: int, emitted: int) -> dict[str, float]:
    """Milliseconds a step, the median; each request has emitted so many tokens, of a third as many distinct ones."""
    from sglang_dflash.step.penalties import Penalties, penalised
    from sglang_dflash.tree import DraftTree

    rng, penalties = random.Random(0), Penalties(requests, VOCAB, "cpu")
    params = SimpleNamespace(frequency_penalty=0.5, presence_penalty=0.2, repetition_penalty=1.1, min_new_tokens=0)
    reqs = []
    for number in range(requests):
        words = [rng.randrange(VOCAB) for _ in range(emitted // 3)]
        output = array("q", [rng.choice(words) for _ in range(emitted)])
        kv = SimpleNamespace(req_pool_idx=number)
        reqs.append(SimpleNamespace(origin_input_ids=[1] * 99, output_ids=output, sampling_params=params, kv=kv))
    numbers, lengths = torch.arange(requests), torch.full((requests,), 99 + emitted)
    penalties.prefill(SimpleNamespace(reqs=reqs, decoding_reqs=None, req_pool_indices=numbers, seq_lens=lengths))
    tokens, depths = torch.randint(VOCAB, (requests, NODES)), torch.arange(NODES).expand(requests, -1)
    mask = torch.ones(requests, NODES, NODES).tril().bool()
    chain = DraftTree(tokens, (depths - 1).clamp(min=0), depths, mask, depths.float(), NODES - 1)
    logits, took = torch.randn(requests, NODES, VOCAB), []
    for _ in range(STEPS):
        marks = [time.perf_counter()]
        assert any(map(penalised, reqs))
        found = penalties.at(numbers, lengths[:, None] + depths)
        marks.append(time.perf_counter())
        found.at_depths(logits[:, :DEPTH])
        marks.append(time.perf_counter())
        found.along(logits, chain)
        marks.append(time.perf_counter())
        penalties.emitted(numbers, tokens[:, :4].contiguous(), torch.full((requests,), 4, dtype=torch.int32))
        marks.append(time.perf_counter())
        took.append([end - start for start, end in pairwise(marks)])
    parts = (round(1e3 * statistics.median(part), 3) for part in zip(*took, strict=True))
    return dict(zip(("found_ms", "draft_ms", "tree_ms", "counted_ms"), parts, strict=True))


def main() -> None:
    from sglang.srt.constrained.llguidance_backend import GuidanceBackend
    from sglang.srt.constrained.xgrammar_backend import XGrammarGrammarBackend
    from sglang.srt.utils.hf_transformers_utils import get_tokenizer

    from sglang_dflash import embedded
    from sglang_dflash.cli.bench import device_name

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--requests", type=int, nargs="*", default=[1, 16])
    args = parser.parse_args()
    torch.set_num_threads(1)
    rows: dict[str, list[dict[str, Any]]] = {"masks": [], "penalties": []}
    for requests in args.requests:
        for emitted in (1000, 4000):
            rows["penalties"].append({"requests": requests, "emitted": emitted, **penalties_row(requests, emitted)})
            print(rows["penalties"][-1], flush=True)
    tokenizer = get_tokenizer(str(embedded.ensure().target))
    backends = {
        "xgrammar": XGrammarGrammarBackend(tokenizer, vocab_size=VOCAB, model_eos_token_ids=[EOS]),
        "llguidance": GuidanceBackend(tokenizer, n_vocab=VOCAB, eos_token_ids=[EOS]),
    }
    for (of, backend), (name, (kind, key, text)) in product(backends.items(), grammars().items()):
        template = getattr(backend, f"dispatch_{kind}")(key)
        for requests, nodes in product(args.requests, (8, 16, 32)):
            row = masks_row(template, tokenizer.encode(text), requests, nodes)
            rows["masks"].append({"backend": of, "grammar": name, "requests": requests, "nodes": nodes, **row})
            print(rows["masks"][-1], flush=True)
    versions = {name: version(name) for name in ("sglang", "torch", "xgrammar", "llguidance")}
    device = {"device": device_name(), "cores": len(os.sched_getaffinity(0)), "versions": versions}
    args.out.write_text(json.dumps({**device, **rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
