"""Each node is masked as by a fresh matcher that took the path token by token: real grammars of both backends."""

from __future__ import annotations

import json
import random
import time
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import pytest
import torch
from sglang.srt.constrained.llguidance_backend import GuidanceBackend
from sglang.srt.constrained.outlines_backend import OutlinesGrammar
from sglang.srt.constrained.reasoner_grammar_backend import ReasonerGrammarObject
from sglang.srt.constrained.xgrammar_backend import XGrammarGrammar, XGrammarGrammarBackend
from sglang.srt.sampling.sampling_params import SamplingParams
from sglang.srt.utils.hf_transformers_utils import get_tokenizer
from torch import Tensor
from transformers import PreTrainedTokenizerBase
from xgrammar import BatchGrammarMatcher

from sglang_dflash import embedded
from sglang_dflash.step import grammar, sampling
from sglang_dflash.step.grammar import Grammars, fill_masks, fill_trees, looks_ahead
from sglang_dflash.tree import DraftTree, walk

VOCAB, EOS, WIDTH = 49152, 0, 12
NEVER = 1  # a token that says nothing
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


def fill_whole(grammar: Any, tokens: list[int], parents: list[int], masks: Tensor) -> None:
    tree = torch.tensor([[tokens], [parents]])
    assert fill_trees([grammar], [0], tree, masks) == []


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


@pytest.mark.parametrize(("backend", "case"), [("xgrammar", kind) for kind in GRAMMARS], indirect=True)
def test_whole_trees_are_masked_the_same(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(grammar, "QUICK", 60.0)
    check_trees(case, fill_whole)


@pytest.mark.parametrize(("backend", "case"), [("xgrammar", "json")], indirect=True)
def test_a_tree_that_takes_long_is_left_as_it_was(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    left = 0

    def then_node_by_node(grammar: Any, tokens: list[int], parents: list[int], masks: Tensor) -> None:
        nonlocal left
        if fill_trees([grammar], [0], torch.tensor([[tokens], [parents]]), masks):
            assert bool((masks == -1).all())
            left += 1
            fill_one(grammar, tokens, parents, masks)

    monkeypatch.setattr(grammar, "QUICK", 1e-9)
    check_trees(case, then_node_by_node)
    assert left > 10


@pytest.mark.parametrize(("backend", "case"), [("xgrammar", "json")], indirect=True)
def test_masks_of_another_state_would_be_seen(case: Case) -> None:
    def of_the_sibling(grammar: Any, tokens: list[int], parents: list[int], masks: Tensor) -> None:
        fill_one(grammar, tokens, [max(0, parent - 1) for parent in parents], masks)

    with pytest.raises(AssertionError):
        check_trees(case, of_the_sibling)
    stays = patch.object(XGrammarGrammar, "rollback", lambda grammar, k: None)
    with stays, pytest.raises((AssertionError, ValueError)):
        check_trees(case)


@pytest.mark.parametrize(("backend", "case"), [("xgrammar", "json"), ("llguidance", "thinking")], indirect=True)
def test_masks_that_are_broken_off_leave_the_grammar_where_it_was(case: Case) -> None:
    make, text = case
    truth, rng, grammar = Truth(make), random.Random(3), make()
    for at in range(len(text)):
        tokens, parents, paths = random_tree(truth, text, at, rng)
        masks, rounds = grammar.allocate_vocab_mask(VOCAB, WIDTH, "cpu"), at % 5
        over = iter([False] * rounds + [True] * WIDTH)
        made, left = fill_masks([grammar], [0], [tokens], [parents], masks, over.__next__)
        assert len(made) <= rounds and (left or len(made) == sum(comes(make, truth, path) for path in paths))
        for node, path in enumerate(paths):
            assert torch.equal(masks[node], truth.mask(path) if node in made else torch.full_like(masks[node], -1))
        grammar.accept_token(text[at])


@pytest.mark.parametrize("long", [0.0, 60.0], ids=["side by side", "one by one"])
@pytest.mark.parametrize(("backend", "case"), [("xgrammar", "json"), ("xgrammar", "thinking")], indirect=True)
def test_a_batch_s_logits_are_masked_row_by_row(case: Case, long: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """Requests with a grammar about one without; the grammars are a token behind until the masks."""
    monkeypatch.setattr(grammar, "LONG", long)
    monkeypatch.setattr(grammar, "_cores", lambda: pytest.fail("threads") if long else BatchGrammarMatcher(4))
    monkeypatch.setattr(grammar, "_end_of_pass", lambda logits: lambda: False)
    make, text = case
    truth, rng = Truth(make), random.Random(1)
    reqs = [request(each) for each in (make(), None, make(), make())]
    trees = [random_tree(truth, text, at, rng) for at in (1, 1, len(text) - 1, 0)]
    tokens, parents = (torch.tensor([tree[i] for tree in trees]) for i in (0, 1))
    tree = DraftTree(tokens, parents, parents, tokens, tokens.float(), 1)
    for token in text[:-2]:
        reqs[2].grammar.accept_token(token)
    grammars = Grammars(SimpleNamespace(reqs=reqs, sampling_info=SimpleNamespace(vocab_size=VOCAB)), tree)
    logits = torch.ones(len(reqs) * WIDTH, VOCAB)
    for row, token in ((0, text[0]), (2, text[-2])):
        reqs[row].grammar.accept_token(token)
    grammars.mask_ahead(logits)
    rows = logits.view(len(reqs), WIDTH, VOCAB)
    assert bool((rows[1] == 1).all())
    for row in (0, 2, 3):
        words = torch.stack([truth.mask(path) for path in trees[row][2]])
        expected = (words[:, :, None] >> torch.arange(32) & 1).view(WIDTH, VOCAB).bool()
        assert torch.equal(rows[row] == 1, expected)
        assert torch.equal(rows[row] == -torch.inf, ~expected)
    assert not grammars.open


def test_a_pause_is_no_long_mask() -> None:
    def busy(*_: Any) -> None:
        ends = time.thread_time() + 2 * grammar.LONG
        while time.thread_time() < ends:
            pass

    def pauses(*_: Any) -> None:
        time.sleep(10 * grammar.LONG)

    quick, slow, halting = (SimpleNamespace(fill_vocab_mask=fill) for fill in (lambda *_: None, busy, pauses))
    mask = torch.zeros(1, 1)
    assert not grammar._fill([quick, halting, quick], mask, [0, 0, 0])
    assert grammar._fill([quick, slow, quick], mask, [0, 0, 0])
    assert grammar._fill([quick], mask, [0], long=True), "it stays so"


def comes(make: Callable[[], Any], truth: Truth, path: list[int]) -> bool:
    """Whether plain decoding comes to the end of a path and goes on."""
    grammar = make()
    for place, token in enumerate(path):
        if not allows(truth.mask(path[:place]), token):
            return False
        grammar.accept_token(token)
    return not grammar.is_terminated()


SAID = 14  # tokens of a text
ALL = 1 << 30
# By request of a batch: whether it has a grammar, and its settings.
BATCH: list[tuple[bool, dict[str, Any]]] = [
    (True, {"temperature": 0.0}),
    (False, {"temperature": 1.0}),
    (True, {"temperature": 1.0}),
    (True, {"temperature": 16.0, "top_k": 2}),
    (True, {"temperature": 0.0, "return_logprob": True}),
]


def request(grammar: Any, return_logprob: bool = False, **settings: Any) -> Any:
    params = SamplingParams(**{"temperature": 0.0, **settings})
    params.normalize(None)
    more = {"custom_logit_processor": None, "return_logprob": return_logprob}
    return SimpleNamespace(grammar=grammar, sampling_params=params, **more)


def settings(reqs: list[Any]) -> Any:
    """A SamplingBatchInfo, as far as sampling asks."""
    params = [req.sampling_params for req in reqs]
    return SimpleNamespace(
        temperatures=torch.tensor([[p.temperature] for p in params]),
        sampling_seed=torch.arange(len(reqs)) + 40,
        top_ks=torch.tensor([p.top_k for p in params], dtype=torch.int32),
        top_ps=torch.tensor([p.top_p for p in params]),
        min_ps=torch.tensor([p.min_p for p in params]),
        need_top_k_sampling=True,
        need_top_p_sampling=True,
        need_min_p_sampling=False,
        is_all_greedy=False,
        vocab_size=VOCAB,
    )


def bits(mask: Tensor) -> Tensor:
    return (mask[:, None] >> torch.arange(32) & 1).flatten().bool()


def likes(text: list[int]) -> Tensor:
    """A target's logits at each position: it likes a text's token, or a forbidden one a little more, or any."""
    logits = torch.randn(SAID + WIDTH, VOCAB, generator=torch.manual_seed(3))
    for at, token in enumerate(text[:SAID]):
        logits[at, token] += 12.0 * (at % 3 != 2)
        logits[at, NEVER] += 14.0 * (at % 3 == 1)
    return logits


def plain_text(truth: Truth, target: Tensor, info: Any, row: int, masked: bool) -> list[int]:
    said: list[int] = []
    while len(said) < SAID and said[-1:] != [EOS]:
        logits = target[len(said)].clone()
        if masked:
            logits[~bits(truth.mask(said))] = -torch.inf
        said += sampling._sample(logits[None], torch.tensor([len(said)]), info, [row]).tolist()
    return said


def check_walks(case: Case, which: list[int], seed: int = 2) -> tuple[int, int]:
    """Walks over trees that guess the text and other tokens, allowed and forbidden, against plain decoding.

    which: requests of BATCH. Masks are made ahead at some nodes of a tree, or at none; and nodes are sampled at once or
    as they come. Returns steps, and masks that were made once the pass was over.
    """
    make, text = case
    truth, rng, target = Truth(make), random.Random(seed), likes(text)
    reqs = [request(make() if masked else None, **asked) for masked, asked in map(BATCH.__getitem__, which)]
    info, steps, late = settings(reqs), 0, 0
    plain = [plain_text(truth, target, info, row, req.grammar is not None) for row, req in enumerate(reqs)]
    texts = [each[:1] for each in plain]
    for req, each in zip(reqs, texts, strict=True):
        if req.grammar is not None:
            req.grammar.accept_token(each[0])
    fill = grammar._fill

    def counted(grammars: list[Any], masks: Tensor, rows: Any, long: bool = False) -> bool:
        nonlocal late
        late += len(grammars) if isinstance(rows, range) else 0
        return fill(grammars, masks, rows, long)

    while any(len(said) < len(whole) for said, whole in zip(texts, plain, strict=True)):
        grown = [
            random_tree(truth, [*whole, *[EOS] * WIDTH], len(said), rng)
            for said, whole in zip(texts, plain, strict=True)
        ]
        tree = tree_of(grown, texts)
        positions = torch.tensor([[len(said)] for said in texts]) + tree.depths
        logits = target[positions.flatten()].clone()
        over = iter([False] * rng.choice([0, 0, 2, 6]) + [True] * 99)
        with patch.multiple(grammar, _end_of_pass=lambda logits, over=over: over.__next__, _fill=counted):
            grammars = Grammars(SimpleNamespace(reqs=reqs, sampling_info=info), tree)
            grammars.mask_ahead(logits)
            ahead = rng.random() < 0.5
            every = sampling._sample(logits, positions.flatten(), info, slice(None)).view(positions.shape)
            sampled = sampling._sample_along(
                logits, info, positions.flatten(), tree, grammars, every if ahead else None
            )
        walked = walk(tree, sampled)
        for row, (said, whole, req) in enumerate(zip(texts, plain, reqs, strict=True)):
            if len(said) < len(whole):
                emitted = walked.tokens[row, : walked.lens[row]].tolist()[: len(whole) - len(said)]
                said += emitted
                assert said == whole[: len(said)], BATCH[which[row]]
                for token in emitted if req.grammar is not None else ():
                    req.grammar.accept_token(token)
        for node in walked.nodes[-1].tolist() if reqs[-1].return_logprob else ():  # which are of masked logits
            forbidden = ~bits(truth.mask(grown[-1][2][node]))
            assert bool((logits.view(len(reqs), WIDTH, -1)[-1, node, forbidden] == -torch.inf).all())
        steps += 1
    return steps, late


def tree_of(grown: list[tuple[list[int], list[int], list[list[int]]]], texts: list[list[int]]) -> DraftTree:
    depths = [[len(path) - len(said) for path in paths] for (*_, paths), said in zip(grown, texts, strict=True)]
    mask = [[[other == path[: len(other)] for other in paths] for path in paths] for *_, paths in grown]
    tokens, parents = (torch.tensor([each[i] for each in grown]) for i in (0, 1))
    deep = torch.tensor(depths)
    return DraftTree(tokens, parents, deep, torch.tensor(mask), deep.float(), int(deep.max()))


GREEDY, FREE, SAMPLED, FILTERED, TOLD = range(5)


def test_walks_say_what_plain_decoding_says(case: Case) -> None:
    steps, _ = check_walks(case, [GREEDY, TOLD])
    assert steps < SAID - 2


@pytest.mark.parametrize(("backend", "case"), [("xgrammar", "json"), ("xgrammar", "regex")], indirect=True)
def test_sampled_walks_say_what_plain_decoding_says(case: Case) -> None:
    check_walks(case, [FREE, SAMPLED, FILTERED, GREEDY])


@pytest.mark.parametrize(("backend", "case"), [("xgrammar", "json")], indirect=True)
@pytest.mark.parametrize("bug", ["a refused choice stands", "a neighbour's mask", "filters go first", "no step back"])
def test_bugs_of_walks_would_be_seen(bug: str, case: Case) -> None:
    fill, takes = grammar._fill, Grammars._takes
    bugs = {
        "a refused choice stands": patch.object(Grammars, "_takes", lambda *args: takes(*args) or True),
        "a neighbour's mask": patch.object(
            grammar, "_fill", lambda grammars, *args: fill([*grammars[1:], *grammars[:1]], *args)
        ),
        "filters go first": patch.object(grammar, "_tells", lambda req: not req.return_logprob),
        "no step back": patch.object(Grammars, "step_back", lambda grammars: None),
    }
    with bugs[bug], pytest.raises((AssertionError, ValueError)):
        for seed in range(8):
            check_walks(case, [GREEDY, *[FILTERED] * 3], seed)


@pytest.mark.parametrize(("backend", "case"), [("xgrammar", "json")], indirect=True)
def test_masks_are_made_only_where_a_walk_needs_them(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of three choices of the target one is forbidden, and one most likely."""
    monkeypatch.setattr(random.Random, "choice", lambda rng, options: options[0])  # none ahead, trees of the text
    _, late = check_walks(case, [GREEDY])
    assert 0 < late <= 2 * SAID // 3 + 1


def test_a_grammar_that_cannot_step_back_is_asked_at_the_root_alone() -> None:
    states = [SimpleNamespace(tokens=[4, 9]), SimpleNamespace(tokens=[5])]
    guide = SimpleNamespace(get_next_instruction=states.__getitem__, get_next_state=lambda state, token: state + 1)
    grammar = OutlinesGrammar(guide, None)
    assert not looks_ahead(grammar) and not looks_ahead(ReasonerGrammarObject(grammar, [1]))
    logits, grammars = at_roots(request(grammar), 16, [4, 9])
    assert (logits[0] == 1).nonzero()[:, 0].tolist() == [4, 9]
    assert bool((logits[1:] == 1).all()) and not grammars.open


@pytest.mark.parametrize(("backend", "case"), [("xgrammar", "json")], indirect=True)
def test_a_custom_processor_is_given_masked_logits(case: Case) -> None:
    """Plain decoding masks first; and such a request's walk ends at its root."""
    make, text = case
    req = request(make())
    req.custom_logit_processor = "some"
    for token in text[:3]:
        req.grammar.accept_token(token)
    logits, grammars = at_roots(req, VOCAB, text[3:5])
    assert torch.equal(logits[0] == 1, bits(Truth(make).mask(text[:3])))
    assert bool((logits[1:] == 1).all()) and not grammars.open
    for token in text[3:]:
        req.grammar.accept_token(token)
    assert bool((at_roots(req, VOCAB, text[3:5])[0] == 1).all())  # a grammar that has ended


def at_roots(req: Any, vocab: int, after: list[int]) -> tuple[Tensor, Grammars]:
    """Logits of ones, as masked ahead for one request's chain of three nodes."""
    tokens, depths = torch.tensor([[7, *after]]), torch.tensor([[0, 1, 2]])
    tree = DraftTree(tokens, (depths - 1).clamp(min=0), depths, torch.ones(1, 3, 3).tril().bool(), depths.float(), 2)
    grammars = Grammars(SimpleNamespace(reqs=[req], sampling_info=SimpleNamespace(vocab_size=vocab)), tree)
    logits = torch.ones(3, vocab)
    grammars.mask_ahead(logits)
    return logits, grammars
