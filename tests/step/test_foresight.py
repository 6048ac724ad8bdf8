"""What grammars lead to, by xgrammar's own; and what comes of it where a draft that knows nothing is told."""

from __future__ import annotations

import json
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from saying import say
from sglang.srt.constrained.llguidance_backend import GuidanceBackend
from sglang.srt.constrained.reasoner_grammar_backend import ReasonerGrammarObject
from sglang.srt.constrained.xgrammar_backend import XGrammarGrammarBackend
from sglang.srt.utils.hf_transformers_utils import get_tokenizer
from transformers import PreTrainedTokenizerBase

from sglang_dflash import embedded
from sglang_dflash.draft.lattice import Candidates
from sglang_dflash.kernels import Leads
from sglang_dflash.step import foresight
from sglang_dflash.step.foresight import Foresight
from sglang_dflash.step.grammar import fill_masks
from sglang_dflash.tree import grow, walk

VOCAB, EOS, PLACES, NODES, DEPTH = 49152, 0, 12, 15, 10


def an_object(**properties: Any) -> dict[str, Any]:
    return {
        "type": "object", "properties": properties, "required": list(properties), "additionalProperties": False
    }  # fmt: skip


TEXT = {"type": "string"}
ORDER = an_object(
    customer=an_object(name=TEXT, age={"type": "integer"}), state={"enum": ["open", "paid"]}, notes=TEXT
)
COMPACT = '{"customer": {"name": "Ann", "age": 31}, "state": "paid", "notes": "none"}'
PRETTY = json.dumps(json.loads(COMPACT), indent=2)


@pytest.fixture(scope="module")
def tokenizer(pair: embedded.Pair) -> PreTrainedTokenizerBase:
    return get_tokenizer(str(pair.target))


@pytest.fixture(scope="module")
def backend(tokenizer: PreTrainedTokenizerBase) -> XGrammarGrammarBackend:
    return XGrammarGrammarBackend(tokenizer, vocab_size=VOCAB, model_eos_token_ids=[EOS])


def behind(grammar: Any, tokenizer: Any, text: str) -> Any:
    for token in tokenizer.encode(text):
        grammar.accept_token(token)
    return grammar


def told(foresight: Foresight, grammar: Any, tokenizer: Any) -> tuple[set[str], bool]:
    """Texts of all ways through a request's leads, and whether one must come."""
    batch = SimpleNamespace(reqs=[SimpleNamespace(grammar=grammar, tokenizer=tokenizer)])
    leads = foresight.leads(batch, "cpu")
    if leads is None:
        return set(), False
    tokens, before = leads.tokens[0].tolist(), leads.before[0].tolist()
    ways = set()
    for end in range(PLACES):
        if tokens[end] >= 0 and end not in before:
            way, at = [], end
            while at >= 0:
                way.insert(0, tokens[at])
                at = before[at]
            ways.add(tokenizer.decode(way))
    return ways, bool(leads.sure[0])


@pytest.mark.parametrize(
    ("text", "ways", "sure"),
    [
        ('{"', {'customer": {"name": "'}, True),
        ('{"customer": {"name": "', {'", "age": '}, False),
        ('{"customer": {"name": "An', {'", "age": '}, False),
        ('{"customer": {"name": "Ann",', {' "age": '}, True),
        ('{"customer": {"name": "Ann", "age": 31', {'}, "state": "open', '}, "state": "paid'}, False),
        ('{\n  "customer": {\n    "name": "Ann",', {'\n    "age": '}, True),
        ('{\n  "customer": {\n    "name": "Ann",\n', {'    "age": '}, True),
        ('{"customer":{"name":"Ann', {'","age":'}, False),
        ('{"customer": {"name": "Ann", "age":', {" "}, True),
        ('{"customer":{"name":"Ann","age":', set(), False),
        ('{"customer": {"name": "Ann", "age": ', set(), False),
        ('{"customer": {"name": "Ann", "age": 31}, "state": "pa', {'id", "notes": "'}, True),
        (COMPACT[:-3], {'"}'}, False),
        (PRETTY[:-4], {'"\n}'}, False),
        (COMPACT, set(), False),
    ],
)
def test_what_a_schema_leads_to(text: str, ways: set[str], sure: bool, backend: Any, tokenizer: Any) -> None:
    grammar = behind(backend.dispatch_json(json.dumps(ORDER)).copy(), tokenizer, text)
    masks = grammar.allocate_vocab_mask(VOCAB, 2, "cpu")
    grammar.fill_vocab_mask(masks, 0)
    got, must = told(Foresight(PLACES), grammar, tokenizer)
    assert must == sure
    assert len(got) == len(ways)
    for way in got:  # its end has no place, or there is more of it
        assert any(way.startswith(full) or (full.startswith(way) and len(way) > 8) for full in ways), way
    grammar.fill_vocab_mask(masks, 1)
    assert torch.equal(masks[0], masks[1]), "the grammar is where it was"


def test_other_grammars_lead_on_too(backend: Any, tokenizer: Any) -> None:
    regex = behind(backend.dispatch_regex(r"(Yes|No), because [a-z ]{5,40}\.").copy(), tokenizer, "Yes")
    assert told(Foresight(PLACES), regex, tokenizer) == ({", because "}, True)
    ebnf = backend.dispatch_ebnf('root ::= "a" ([0-9]+ | "b" root)').copy()
    assert told(Foresight(PLACES), ebnf, tokenizer) == ({"a"}, True)


def test_a_character_may_come_byte_by_byte(backend: Any, tokenizer: Any) -> None:
    schema = an_object(größe={"enum": ["ähnlich", "日本", "日曜", "😀", "😁x"]}, été=TEXT)
    for value in ("ähnlich", "日本", "😀"):
        grammar, foresight = backend.dispatch_json(json.dumps(schema)).copy(), Foresight(PLACES)
        pieces = list(grammar.ctx.tokenizer_info.decoded_vocab)
        for byte in f'{{"größe": "{value}", "été": "'.encode():
            told(foresight, grammar, tokenizer)
            grammar.accept_token(pieces.index(bytes([byte])))
        assert told(foresight, grammar, tokenizer)[0] == {'"}'}


def test_long_texts_are_not_read_again(backend: Any, tokenizer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    grammar = behind(backend.dispatch_json(json.dumps(ORDER)), tokenizer, '{"customer": {"name": "Ann')
    tokens = len(grammar.accepted_tokens)
    monkeypatch.setattr(foresight, "MOST_TOKENS", tokens)
    assert told(Foresight(PLACES), grammar, tokenizer)[0]
    monkeypatch.setattr(foresight, "MOST_TOKENS", tokens - 1)
    assert told(Foresight(PLACES), grammar, tokenizer) == (set(), False)


@pytest.mark.parametrize("run", [1, 3, 40])
def test_a_text_that_goes_on_is_read_as_a_whole_one(run: int, backend: Any, tokenizer: Any) -> None:
    numbers = {"type": "array", "items": {"type": "integer"}}
    schema = an_object(**{"a b": TEXT, 'c": ': {"type": "number"}, "d": numbers})
    text = '{"a b" : "x \\\\ 12\\"y, a text that is a little longer" , "c\\": ": -12.50e3, "d":[1,23 ,456]}'
    ids, kept = tokenizer.encode(text), Foresight(PLACES)
    grammar = backend.dispatch_json(json.dumps(schema)).copy()
    kept._learn_tokens(grammar)
    for start in range(0, len(ids), run):
        for token in ids[start : start + run]:
            grammar.accept_token(token)
        assert kept._read(grammar) == Foresight._read(fresh(kept), grammar)
    assert kept._read(grammar)[0].decode() == text
    other = behind(backend.dispatch_json(json.dumps(schema)).copy(), tokenizer, '{"a b')
    assert kept._read(other)[0] == b'{"a b'
    other.rollback(1)
    assert kept._read(other) == Foresight._read(fresh(kept), other)


def fresh(known: Foresight) -> Foresight:
    """One that knows the tokens and has read nothing."""
    new = Foresight(PLACES)
    new._pieces, new._starts = known._pieces, known._starts
    return new


@pytest.mark.parametrize("indent", [None, 2])
def test_what_is_remembered_is_what_would_be_found(indent: int | None, backend: Any, tokenizer: Any) -> None:
    """Other texts of the same schema have been seen. Within a long value of an `enum` the text alone does not tell."""
    ways = ["the first of several ways", "the second of several ways"]
    old, schema = Foresight(PLACES), json.dumps(an_object(kind={"enum": ways}, **ORDER["properties"]))
    whole = {"kind": ways[0], **json.loads(COMPACT)}
    text, others = json.dumps(whole, indent=indent), [whole | {"kind": ways[1]}, whole | {"state": "open"}]
    for seen in (json.dumps(others[0]), json.dumps(others[1], indent=2), json.dumps(others[0], indent=1)):
        grammar = backend.dispatch_json(schema).copy()
        for token in tokenizer.encode(seen):
            grammar.accept_token(token)
            told(old, grammar, tokenizer)
    grammar, found = backend.dispatch_json(schema).copy(), 0
    for token in tokenizer.encode(text):
        grammar.accept_token(token)
        new = fresh(old)
        new._usual = old._usual
        now = told(new, grammar, tokenizer)
        assert told(old, grammar, tokenizer) == now
        found += bool(now[0])
    assert found > 10


def test_nothing_is_told_of_other_backends_and_of_thoughts(backend: Any, tokenizer: Any) -> None:
    other = GuidanceBackend(tokenizer, n_vocab=VOCAB, eos_token_ids=[EOS]).dispatch_json(json.dumps(ORDER)).copy()
    assert told(Foresight(PLACES), other, tokenizer) == (set(), False)
    assert told(Foresight(PLACES), None, tokenizer) == (set(), False)
    end = tokenizer.encode("</think>")
    thinking = ReasonerGrammarObject(backend.dispatch_json(json.dumps(ORDER)).copy(), end)
    thinking.maybe_init_reasoning(True)
    assert told(Foresight(PLACES), thinking, tokenizer) == (set(), False)
    for token in [*end, *tokenizer.encode('{"')]:
        thinking.accept_token(token)
    assert told(Foresight(PLACES), thinking, tokenizer)[1]


def test_of_a_batch_in_free_text_nothing_is_known_at_all(backend: Any, tokenizer: Any) -> None:
    """So the draft's graph is asked for its tree, as in a batch without grammars."""
    tag = {
        "type": "structural_tag",
        "structures": [{"begin": "CALL ", "schema": ORDER, "end": " DONE"}],
        "triggers": ["CALL "],
    }
    tags = backend.dispatch_structural_tag(json.dumps(tag))
    texts = ["So I say", 'He said: "no", and (then) 12', "CALL " + COMPACT + " DONE and on", None]
    grammars = [None if text is None else behind(tags.copy(), tokenizer, text) for text in texts]
    reqs = [SimpleNamespace(grammar=grammar, tokenizer=tokenizer) for grammar in grammars]
    assert Foresight(PLACES).leads(SimpleNamespace(reqs=reqs), "cpu") is None
    behind(grammars[0], tokenizer, " CALL {")
    leads = Foresight(PLACES).leads(SimpleNamespace(reqs=reqs), "cpu")
    assert leads is not None and (leads.tokens >= 0).any(1).tolist() == [True, False, False, False]
    assert leads.sure.tolist() == [1, 0, 0, 0]


def wrong(leads: Leads | None) -> Leads | None:
    """The planted bug: other tokens than those that come."""
    return leads and leads._replace(tokens=torch.where(leads.tokens < 0, -1, (leads.tokens + 1) % VOCAB))


@pytest.mark.parametrize("text", [COMPACT, PRETTY])
def test_leads_cost_or_save_steps_but_never_a_token(text: str, backend: Any, tokenizer: Any) -> None:
    """A target that writes a text, and where that is over whatever it likes; a draft that knows nothing at all."""
    ids = tokenizer.encode(text)
    steps = {}
    for name, told_ in (("nothing", lambda leads: None), ("leads", lambda leads: leads), ("wrong ones", wrong)):
        said, steps[name] = run(backend, tokenizer, ids, told_)
        assert said == [*ids, EOS], name
    assert steps["nothing"] == steps["wrong ones"] == len(ids)
    assert steps["leads"] < len(ids) / 2, steps


def run(backend: Any, tokenizer: Any, ids: list[int], told_: Any) -> tuple[list[int], int]:
    generator, foresight = torch.manual_seed(5), Foresight(PLACES)
    req = SimpleNamespace(grammar=backend.dispatch_json(json.dumps(ORDER)).copy(), tokenizer=tokenizer)
    batch = SimpleNamespace(reqs=[req], sampling_info=SimpleNamespace(vocab_size=VOCAB))
    said, steps = ids[:1], 0
    req.grammar.accept_token(ids[0])
    while said[-1] != EOS:
        leads, hidden = told_(foresight.leads(batch, "cpu")), torch.randn(1, DEPTH, 4, generator=generator)
        scores = torch.randn(DEPTH, VOCAB, generator=generator)
        bonus = torch.tensor(said[-1:])
        candidates = Candidates.of(hidden, lambda _, s=scores: s, None, 16)
        tree = grow(candidates.lattice(bonus, None, leads), bonus, NODES)
        coming = [*ids, *[EOS] * (DEPTH + 1)][len(said) :]
        logits = torch.randn(NODES + 1, VOCAB, generator=generator)
        for node, depth in enumerate(tree.depths[0].tolist()):
            logits[node, coming[depth]] = 99.0
        masks = req.grammar.allocate_vocab_mask(VOCAB, NODES + 1, "cpu")
        fill_masks([req.grammar], [0], tree.tokens.tolist(), tree.parents.tolist(), masks)
        req.grammar.apply_vocab_mask(logits=logits, vocab_mask=masks)
        walked = walk(tree, logits.argmax(-1)[None])
        say(walked, said, req.grammar, EOS)
        steps += 1
    return said, steps
