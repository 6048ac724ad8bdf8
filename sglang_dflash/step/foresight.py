"""What grammars let come next, at a step's roots: told to the draft, which knows nothing of grammars.

A schema leaves little open between one value and the next: a comma, the next name, a colon, a quotation mark. What it
leaves open there is white space, which is taken to go on as it went before. Inside a value nobody knows when it ends,
but what comes once it does is known. A wrong guess costs a few nodes of a tree, never a token of the text: what is
emitted are the target's own samples under the grammar's masks.

What comes next hardly depends on what the values before were. So it is looked up by the text without them, and asked of
the grammar anew only where that takes no such thing; of a text only what is new is read.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial
from typing import Any
from weakref import WeakKeyDictionary

import numpy as np
import torch
from sglang.srt.constrained.reasoner_grammar_backend import ReasonerGrammarObject
from sglang.srt.constrained.xgrammar_backend import XGrammarGrammar
from torch import Tensor

from sglang_dflash.kernels import Leads
from sglang_dflash.step.upload import upload_numbers

FEW = 512  # words of a mask that hold tokens, where a grammar leaves little open
BRANCHES = 4  # ways that are told, where one of several comes
LONGEST = 48  # bytes of all texts that are told
SPACE = b" \t\n\r"
KNOWN = 4096  # places in texts of which it is remembered what came next
MOST_TOKENS = 1024  # of a text that is looked at
SHORT = 16  # bytes of a string that has not ended, which are told apart
STRING = re.compile(rb'"(?:[^"\\]|\\.)*+"?+', re.DOTALL)
VALUE = re.compile(STRING.pattern + rb"([ \t\n\r]*:)?|\d+", re.DOTALL)  # or a name, which a colon follows
PRETTY = re.compile(rb"[{\[]\n( *)")
COMPACT = re.compile(rb"[:,]( ?)[^\s]")


@dataclass(frozen=True)
class Coming:
    """What may come next, of which some must (sure) or may, as a trie: tokens, and the places of those before, as in
    `Leads`.
    """

    tokens: list[int]
    before: list[int]
    sure: bool


NOTHING = Coming([], [], False)
Texts = tuple[tuple[bytes, ...], bool]  # that may come, and whether one of them must


@dataclass
class Said:
    """The text of so many tokens; bare: without values, up to its last value, which may go on and begins at `last`."""

    tokens: int = 0
    text: bytes = b""
    bare: bytes = b""
    last: int = 0


class Foresight:
    """For one server's grammars, those of xgrammar.

    places: leads of a request at most.
    """

    def __init__(self, places: int) -> None:
        self._places = places
        self._pieces: list[bytes] = []
        self._starts = np.zeros(0, dtype=np.int16)
        self._usual = b" "  # as in `_space`, of the request seen last: what another one begins with
        self._said: WeakKeyDictionary[XGrammarGrammar, Said] = WeakKeyDictionary()
        self._known: dict[tuple[str | None, bytes, bytes, bool], Texts] = {}
        self._tries: dict[tuple[bytes, ...], tuple[list[int], list[int]]] = {}
        self._mask: Tensor | None = None

    def leads(self, batch: Any, device: Any) -> Leads | None:
        """Of a batch whose grammars are up to date; None where nothing is known of any."""
        coming = [self._of(req) for req in batch.reqs]
        if not any(each.tokens for each in coming):
            return None
        bs, places = len(coming), self._places
        none = [-1] * places
        tokens, before, sure = upload_numbers(
            torch.device(device),
            [n for each in coming for n in (each.tokens + none)[:places]],
            [n for each in coming for n in (each.before + none)[:places]],
            [each.sure for each in coming],
        )
        return Leads(tokens.view(bs, places), before.view(bs, places), sure)

    def _of(self, req: Any) -> Coming:
        grammar = req.grammar
        if isinstance(grammar, ReasonerGrammarObject):
            grammar = grammar.grammar if grammar._grammar_active() else None
        if type(grammar) is not XGrammarGrammar or grammar.is_terminated():
            return NOTHING
        if len(grammar.accepted_tokens) > MOST_TOKENS:
            return NOTHING
        self._learn_tokens(grammar)
        text, bare = self._read(grammar)
        self._usual = _style(bare, self._usual)
        texts, sure = self._recalled(grammar, bare, False, partial(self._texts, grammar, text, bare))
        if texts not in self._tries:
            trie = _trie([self._tokens(req.tokenizer, each) for each in texts], self._places)
            _remember(self._tries, texts, trie)
        return Coming(*self._tries[texts], sure)

    def _read(self, grammar: XGrammarGrammar) -> tuple[bytes, bytes]:
        """The text that a grammar took, and the same without its values."""
        said = self._said.get(grammar)
        if said is None or said.tokens > len(grammar.accepted_tokens):
            said = self._said[grammar] = Said()
        said.text += b"".join([self._pieces[token] for token in grammar.accepted_tokens[said.tokens :]])
        said.tokens = len(grammar.accepted_tokens)
        rest = said.text[said.last :]
        begins = max((value.start() for value in VALUE.finditer(rest)), default=0)
        said.bare += VALUE.sub(_without_value, rest[:begins])
        said.last += begins
        return said.text, said.bare + VALUE.sub(_without_value, rest[begins:])

    def _recalled(self, grammar: XGrammarGrammar, bare: bytes, ended: bool, find: Callable[[], Texts]) -> Texts:
        """What was found behind such a text before, if the grammar takes that; ended: behind its last value alone."""
        key = grammar.key_string, bare, self._usual, ended
        known = self._known.get(key)
        if known is None or not all(_takes(grammar.matcher, each) for each in known[0]):
            known = find()
            _remember(self._known, key, known)
        return known

    def _texts(self, grammar: XGrammarGrammar, text: bytes, bare: bytes) -> Texts:
        """What may come behind a text, and whether one of these must, but for white space."""
        matcher = grammar.matcher
        if known := self._onward(matcher, text, BRANCHES, LONGEST):
            return tuple(known), True
        texts: list[bytes] = []
        for end in (b'"', b",", b"}", b"]"):  # of a value that may go on
            if matcher.accept_string(end):
                find = partial(self._behind, matcher, text + end)
                after, _ = self._recalled(grammar, VALUE.sub(_without_value, bare + end), True, find)
                texts += [end + more for more in after]
                matcher.rollback(1)
                if end == b'"':
                    break
        return tuple(texts), False

    def _behind(self, matcher: Any, text: bytes) -> Texts:
        return tuple(self._onward(matcher, text, 2, LONGEST)), False

    def _onward(self, matcher: Any, text: bytes, ways: int, room: int) -> list[bytes]:
        """The texts that a grammar leads to behind a text, up to where it leaves much open; at most so many ways, and
        ended where they are longer than some room.
        """
        more, steps, starts = b"", 0, b""
        while len(more) < room and not matcher.is_terminated():
            part = _forced(matcher)
            if not part:
                starts = self._next_starts(matcher)
                if len(starts) != 1:
                    break
                part = self._space(text + more, starts) + starts
            if not matcher.accept_string(part):
                break
            more, steps, starts = more + part, steps + 1, b""
        if 1 < len(starts) <= ways:
            left = (room - len(more)) // len(starts)
            texts = [more + way for way in self._ways(matcher, text + more, starts, ways // len(starts), left)]
        else:
            space = self._space(text + more, b"0") if (text + more).endswith(b":") else b""
            if space and _takes(matcher, space):
                more += space  # before a value of which nothing is known
            texts = [more] if more else []
        if steps:
            matcher.rollback(steps)
        return texts

    def _ways(self, matcher: Any, text: bytes, starts: bytes, ways: int, room: int) -> list[bytes]:
        """The texts that a grammar leads to behind each of several beginnings; ways, room: of one of them."""
        texts = []
        for start in starts:
            part = self._space(text, bytes([start])) + bytes([start])
            if matcher.accept_string(part):
                rest = self._onward(matcher, text + part, ways, room - len(part))
                texts += [part + each for each in rest or [b""]]
                matcher.rollback(1)
        return texts

    def _next_starts(self, matcher: Any) -> bytes:
        """The bytes that come next where a grammar leaves little open, white space left out."""
        if self._mask is None:
            self._mask = torch.zeros(1, -(-len(self._pieces) // 32), dtype=torch.int32)
        matcher.fill_next_token_bitmask(self._mask, 0)
        words = self._mask.numpy()[0]
        some = np.flatnonzero(words)
        if len(some) > FEW:
            return b""
        bits = np.unpackbits(words[some, None].view(np.uint8), axis=1, bitorder="little")
        starts = set(self._starts[(some[:, None] * 32 + np.arange(32))[bits == 1]].tolist()) - {-1}
        return bytes(sorted(starts)) if max(starts, default=256) < 128 else b""

    def _space(self, text: bytes, start: bytes) -> bytes:
        """White space between a text and what comes next, less what of it is there."""
        body = text.rstrip(SPACE)
        if not body:
            return b""
        last, there = body[-1:], text[len(body) :]
        if self._usual.startswith(b"\n"):
            bare = STRING.sub(b"", body)
            deep = sum(map(bare.count, b"{[")) - sum(map(bare.count, b"}]")) - (start in b"}]")
            new_line = last in b",{[" or start in b"}]"
            space = b"\n" + self._usual[1:] * deep if new_line else b" " if last == b":" else b""
        else:
            space = self._usual if last in b",:" else b""
        return space[len(there) :] if space.startswith(there) else b""

    def _tokens(self, tokenizer: Any, text: bytes) -> tuple[int, ...]:
        """As a tokenizer writes a text; nothing where it cannot."""
        tokens = tuple(tokenizer.encode(text.decode(errors="replace"), add_special_tokens=False))
        return tokens if b"".join([self._pieces[token] for token in tokens]) == text else ()

    def _learn_tokens(self, grammar: XGrammarGrammar) -> None:
        """What each token says, once; one that says nothing but white space starts with nothing (-1)."""
        if not self._pieces:
            self._pieces = list(grammar.ctx.tokenizer_info.decoded_vocab)
            bare = [piece.lstrip(SPACE) for piece in self._pieces]
            starts = [b[0] if b else -1 if piece else 255 for b, piece in zip(bare, self._pieces, strict=True)]
            self._starts = np.array(starts, dtype=np.int16)


def _remember(known: dict[Any, Any], key: Any, value: Any) -> None:
    if len(known) == KNOWN:
        known.clear()
    known[key] = value


def _without_value(value: re.Match[bytes]) -> bytes:
    text = value[0]
    if value[1]:
        return text
    if not text.startswith(b'"'):
        return b"0"
    return b'""' if text.endswith(b'"') and len(text) > 1 else text if len(text) < SHORT else b'"'


def _forced(matcher: Any) -> bytes:
    """The text that must come; nothing where it would not be whole characters, which xgrammar cannot say."""
    try:
        forced: str = matcher.find_jump_forward_string()
    except UnicodeDecodeError:
        return b""
    return forced.encode()


def _takes(matcher: Any, text: bytes) -> bool:
    """Whether a grammar may go on with a text; it stays where it is."""
    if not matcher.accept_string(text):
        return False
    matcher.rollback(1)
    return True


def _style(bare: bytes, usual: bytes) -> bytes:
    """White space as a text writes it: a new line with one level's indentation, or what is behind commas and colons."""
    if found := PRETTY.search(bare):
        return b"\n" + found[1]
    if found := COMPACT.search(bare):
        return found[1]
    return usual


def _trie(texts: Iterable[tuple[int, ...]], places: int) -> tuple[list[int], list[int]]:
    """Several token sequences as one trie, the nearest tokens first: tokens, and places of those before."""
    tokens: list[int] = []
    before: list[int] = []
    ways = [(text, -1) for text in texts]
    depth = 0
    while ways:
        ways = [(text, at) for text, at in ways if depth < len(text)]
        for i, (text, at) in enumerate(ways):
            known = [j for j, pair in enumerate(zip(tokens, before, strict=True)) if pair == (text[depth], at)]
            if not known and len(tokens) == places:
                return tokens, before
            if not known:
                tokens.append(text[depth])
                before.append(at)
            ways[i] = text, known[0] if known else len(tokens) - 1
        depth += 1
    return tokens, before
