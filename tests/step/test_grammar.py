"""Each node is masked as by a fresh matcher that took the path token by token: real grammars of both backends."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import pytest
import torch
from saying import say
from sglang.srt.constrained.llguidance_backend import GuidanceBackend
from sglang.srt.constrained.outlines_backend import OutlinesGrammar
from sglang.srt.constrained.reasoner_grammar_backend import ReasonerGrammarObject
from sglang.srt.constrained.xgrammar_backend import XGrammarGrammar, XGrammarGrammarBackend
from sglang.srt.utils.hf_transformers_utils import get_tokenizer
from torch import Tensor
from transformers import PreTrainedTokenizerBase
from xgrammar import BatchGrammarMatcher

from sglang_dflash import embedded
from sglang_dflash.step import grammar
from sglang_dflash.step.grammar import NodeMasks, fill_masks, looks_ahead
from sglang_dflash.tree import DraftTree, walk

VOCAB, EOS, WIDTH = 49152, 0, 12
Case = tuple[Callable[[], Any], list[int]]
PROPERTIES = {"answer": {"type": "integer"}, "unit": {"type": "string", "maxLength": 30}}
SCHEMA = {"type": "object", "properties": PROPERTIES, "required": list(PROPERTIES)}
JSON = '{"answer": 42, "unit": "apples and pears"}'
TAG = {
    "type": "structural_tag",
    "structures": [{"begin": "CALL ", "schema": SCHEMA, "end": " DONE"}],
    "triggers": ["CALL "],
}
# kind of grammar -> what describes it, and a text that it takes
GRAMMARS = {
    "json": (json.dumps(SCHEMA), JSON),
    "regex": (r"(Yes|No), because [a-z ]{5,40}\.", "No, because it is not so."),
    "ebnf": ('root ::= "a" ([0-9]+ | "b" root)', "ababa375"),
    "structural_tag": (json.dumps(TAG), f"I say: CALL {JSON} DONE and so on"),
}


@pytest.fixture(scope="module")
def tokenizer(pair: embedded.Pair) -> PreTrainedTokenizerBase:
    return get_tokenizer(str(pair.target))


@pytest.fixture(scope="module", params=["xgrammar", "llguidance"])
def backend(request: pytest.FixtureRequest, tokenizer: PreTrainedTokenizerBase) -> Any:
    if request.param == "xgrammar":
        return XGrammarGrammarBackend(tokenizer, vocab_size=VOCAB, model_eos_token_ids=[EOS])
    return GuidanceBackend(tokenizer, n_vocab=VOCAB, eos_token_ids=[EOS])


@pytest.fixture(scope="module", params=[*GRAMMARS, "thinking"])
def case(request: pytest.FixtureRequest, backend: Any, tokenizer: Any) -> Case:
    """What makes a fresh grammar, and tokens that it takes to its end."""
    kind = "json" if request.param == "thinking" else request.param
    key, text = GRAMMARS[kind]
    template = getattr(backend, f"dispatch_{kind}")(key)
    if request.param != "thinking":
        return template.copy, [*tokenizer.encode(text), EOS]
    end = tokenizer.encode("</think>")
    assert len(end) > 1
    template = ReasonerGrammarObject(template, end)

    def make() -> Any:
        grammar = template.copy()
        grammar.maybe_init_reasoning(True)
        return grammar

    return make, [*tokenizer.encode("So think I."), *end, *tokenizer.encode(text), EOS]


class Truth:
    """What plain decoding masks behind each path, by a fresh matcher each."""

    def __init__(self, make: Callable[[], Any]) -> None:
        self._make = make
        self._seen: dict[tuple[int, ...], Tensor] = {}

    def mask(self, path: list[int]) -> Tensor:
        """[V / 32]; all ones where plain decoding does not come."""
        if tuple(path) not in self._seen:
            self._seen[tuple(path)] = self._behind(self._make(), path)
        return self._seen[tuple(path)]

    def _behind(self, grammar: Any, path: list[int]) -> Tensor:
        mask = grammar.allocate_vocab_mask(VOCAB, 1, "cpu")
        for place, token in enumerate(path):
            if grammar.is_terminated() or not allows(self.mask(path[:place]), token):
                return mask[0]
            grammar.accept_token(token)
        if not grammar.is_terminated():
            grammar.fill_vocab_mask(mask, 0)
        return mask[0]

    def some_token(self, path: list[int], rng: random.Random) -> int:
        """One that the grammar lets follow."""
        words = self.mask(path).nonzero()[:, 0]
        while True:
            token = int(words[rng.randrange(len(words))]) * 32 + rng.randrange(32)
            if allows(self.mask(path), token):
                return token


def allows(mask: Tensor, token: int) -> bool:
    return bool(int(mask[token // 32]) >> token % 32 & 1)


def random_tree(
    truth: Truth, text: list[int], at: int, rng: random.Random
) -> tuple[list[int], list[int], list[list[int]]]:
    """Tokens, parents and paths: the text goes on, or what may follow does, or what may not."""
    tokens, parents, paths = [7], [0], [text[:at]]
    while len(tokens) < WIDTH:
        parent = rng.randrange(len(tokens))
        path = paths[parent]
        on_text = path == text[: len(path)] and len(path) < len(text)
        token = rng.choice([text[len(path)] if on_text else EOS, truth.some_token(path, rng), rng.randrange(VOCAB)])
        if [*path, token] not in paths:
            tokens.append(token)
            parents.append(parent)
            paths.append([*path, token])
    return tokens, parents, paths


def fill_one(grammar: Any, tokens: list[int], parents: list[int], masks: Tensor) -> Any:
    return fill_masks([grammar], [0], [tokens], [parents], masks)


def check_trees(case: Case, fill: Any = fill_one) -> None:
    """Fill the masks of trees all along a text, and compare each."""
    make, text = case
    truth, rng, grammar, constrained = Truth(make), random.Random(0), make(), 0
    for at in range(len(text)):
        tokens, parents, paths = random_tree(truth, text, at, rng)
        masks = grammar.allocate_vocab_mask(VOCAB, WIDTH, "cpu")
        fill(grammar, tokens, parents, masks)
        for node, path in enumerate(paths):
            assert torch.equal(masks[node], truth.mask(path)), (node, path)
        constrained += int((masks != -1).any(1).sum())
        grammar.accept_token(text[at])  # it is where it was
    assert constrained > len(text)


def test_every_node_is_masked_by_the_state_of_its_own_path(case: Case) -> None:
    check_trees(case)


@pytest.mark.parametrize(("backend", "case"), [("xgrammar", "json")], indirect=True)
def test_masks_of_another_state_would_be_seen(case: Case) -> None:
    def of_the_sibling(grammar: Any, tokens: list[int], parents: list[int], masks: Tensor) -> None:
        fill_one(grammar, tokens, [max(0, parent - 1) for parent in parents], masks)

    with pytest.raises(AssertionError):
        check_trees(case, of_the_sibling)
    stays = patch.object(XGrammarGrammar, "rollback", lambda grammar, k: None)
    with stays, pytest.raises((AssertionError, ValueError)):
        check_trees(case)


@pytest.mark.parametrize(("backend", "case"), [("xgrammar", "json"), ("xgrammar", "thinking")], indirect=True)
def test_a_batch_s_logits_are_masked_row_by_row(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two requests with a grammar about one without; the grammars are a token behind until the barrier."""
    monkeypatch.setattr(grammar, "_cores", lambda: BatchGrammarMatcher(4))
    make, text = case
    truth, rng = Truth(make), random.Random(1)
    reqs = [SimpleNamespace(grammar=each) for each in (make(), None, make())]
    trees = [random_tree(truth, text, at, rng) for at in (1, 1, len(text) - 1)]
    tokens, parents = (torch.tensor([tree[i] for tree in trees]) for i in (0, 1))
    tree = DraftTree(tokens, parents, parents, tokens, tokens.float(), 1)
    for token in text[:-2]:
        reqs[2].grammar.accept_token(token)
    masks = NodeMasks(SimpleNamespace(reqs=reqs, sampling_info=SimpleNamespace(vocab_size=VOCAB)), tree)
    logits = torch.ones(3 * WIDTH, VOCAB)
    masks.apply(logits, lambda: [reqs[row].grammar.accept_token(t) for row, t in ((0, text[0]), (2, text[-2]))])
    rows = logits.view(3, WIDTH, VOCAB)
    assert bool((rows[1] == 1).all())
    for row in (0, 2):
        words = torch.stack([truth.mask(path) for path in trees[row][2]])
        expected = (words[:, :, None] >> torch.arange(32) & 1).view(WIDTH, VOCAB).bool()
        assert torch.equal(rows[row] == 1, expected)
        assert torch.equal(rows[row] == -torch.inf, ~expected)
    assert masks.seconds > 0
    for made, row in zip(masks.made, masks.rows, strict=True):
        assert made.tolist() == [comes(make, truth, path) for path in trees[row][2]]


def comes(make: Callable[[], Any], truth: Truth, path: list[int]) -> bool:
    """Whether plain decoding comes to the end of a path and goes on."""
    grammar = make()
    for place, token in enumerate(path):
        if not allows(truth.mask(path[:place]), token):
            return False
        grammar.accept_token(token)
    return not grammar.is_terminated()


@pytest.mark.parametrize(("backend", "case"), [("xgrammar", "regex")], indirect=True)
def test_walks_say_what_plain_decoding_says(case: Case) -> None:
    """A target that likes any token at random; trees that guess the text and other tokens, allowed and forbidden."""
    make, _ = case
    truth, rng = Truth(make), random.Random(2)
    target = torch.randn(64, VOCAB, generator=torch.manual_seed(3))  # what it likes at each position
    plain: list[int] = []
    while not plain or plain[-1] != EOS:
        bits = truth.mask(plain)[:, None] >> torch.arange(32) & 1
        plain.append(int(target[len(plain)].where(bits.flatten().bool(), -torch.inf).argmax()))
    req, said, steps = SimpleNamespace(grammar=make()), plain[:1], 0
    info = SimpleNamespace(vocab_size=VOCAB)
    req.grammar.accept_token(plain[0])
    while said[-1] != EOS:
        tokens, parents, paths = random_tree(truth, plain, len(said), rng)
        depths = torch.tensor([[len(path) - len(said) for path in paths]])
        mask = torch.tensor([[[other == path[: len(other)] for other in paths] for path in paths]])
        deep = int(depths.max())
        tree = DraftTree(torch.tensor([tokens]), torch.tensor([parents]), depths, mask, depths.float(), deep)
        logits = target[len(said) + depths[0]].clone()
        NodeMasks(SimpleNamespace(reqs=[req], sampling_info=info), tree).apply(logits, None)
        walked = walk(tree, logits.argmax(-1)[None])
        say(walked, said, req.grammar, EOS)
        steps += 1
    assert said == plain
    assert steps < len(plain) - 1


def test_a_grammar_that_cannot_step_back_is_asked_at_the_root_alone() -> None:
    states = [SimpleNamespace(tokens=[4, 9]), SimpleNamespace(tokens=[5])]
    guide = SimpleNamespace(get_next_instruction=states.__getitem__, get_next_state=lambda state, token: state + 1)
    grammar = OutlinesGrammar(guide, None)
    assert not looks_ahead(grammar) and not looks_ahead(ReasonerGrammarObject(grammar, [1]))
    masks = grammar.allocate_vocab_mask(16, 3, "cpu")
    assert fill_one(grammar, [7, 4, 9], [0, 0, 0], masks).tolist() == [[True, False, False]]
    assert (~masks).nonzero().tolist() == [[0, 4], [0, 9], *([row, token] for row in (1, 2) for token in range(16))]
