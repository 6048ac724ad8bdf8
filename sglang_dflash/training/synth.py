"""Prompts by seeded self-synthesis, and conversations on them, all in the target's own words.

The target continues a user's turn that begins with one of our openers on one of our topics; what it says there becomes
a prompt. Breadth comes from the lists in prompts/, not from the target's habits.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable
from dataclasses import dataclass, field
from functools import cache
from importlib.resources import files
from pathlib import Path
from typing import Any

import numpy as np

from sglang_dflash.training.data import Document
from sglang_dflash.training.generate import MIN_P, Engine, Progress, Request

SOURCES = ["synthetic", "given", "text", "list", "document", "talk"]  # the last three: see long.py
USER_TOKENS, ANSWER_TOKENS = 96, 448
LONGEST_PROMPT = 400  # tokens, what came before in the conversation included; longer ones are dropped
LONG_ROUNDS = 1 << 20  # where the engine's seeds of long conversations begin
TEMPERATURES = 0.0, 0.7, 1.0  # of the answers to one given prompt
SAMPLED, SAMPLED_AT = 0.3, (0.6, 1.0)  # share of answers to other prompts that are sampled, and at what temperatures
# Shares of all documents that are raw text, of conversations of two turns.
TEXT_SHARE, SECOND_TURN_SHARE = 0.06, 0.25
SYSTEM_SHARES = (0.7, 0.1, 0.2)  # the chat template's own, an empty one, one of ours
NUMBER = re.compile(r"\b\d{1,9}\b")


@cache
def lines(name: str) -> list[str]:
    """The lines of prompts/<name>.txt."""
    text = (files("sglang_dflash.training") / "prompts" / f"{name}.txt").read_text()
    return [line.rstrip() for line in text.splitlines() if line.strip()]


def words(text: str) -> list[str]:
    return re.findall(r"[a-z0-9]+", text.lower())


class HeldOut:
    """Prompts set aside for evaluation: nothing like them may be trained on."""

    SPAN = 8  # words in a row that betray a held-out prompt

    def __init__(self, prompts: Iterable[str]) -> None:
        self.whole, self.spans = set(), set()
        for prompt in prompts:
            w = words(prompt)
            self.whole.add(" ".join(w))
            self.spans |= self._spans(w)

    def _spans(self, w: list[str]) -> set[str]:
        return {" ".join(w[i : i + self.SPAN]) for i in range(len(w) - self.SPAN + 1)}

    def holds(self, prompt: str) -> bool:
        w = words(prompt)
        return " ".join(w) in self.whole or not self.spans.isdisjoint(self._spans(w))


def read_prompts(path: Path) -> list[str]:
    """Prompts of a .jsonl file with a `prompt` or `question` in each line."""
    rows = [json.loads(line) for line in path.read_text().splitlines() if line.strip()]
    return [row["prompt"] if "prompt" in row else row["question"] for row in rows]


def varied(prompts: list[str], copies: int, seed: int) -> list[str]:
    """`copies` of each prompt that has two numbers or more, with others of as many digits in their place."""
    rng = np.random.default_rng(seed)

    def changed(prompt: str) -> str:
        others: dict[str, str] = {}
        for number in NUMBER.findall(prompt):
            low = 10 ** (len(number) - 1)
            others.setdefault(number, str(rng.integers(low, 10 * low)))
        return NUMBER.sub(lambda found: others[found[0]], prompt)

    return [changed(p) for p in prompts if len(set(NUMBER.findall(p))) > 1 for _ in range(copies)]


class ChatFormat:
    """A chat template cut at what people say: before the user, user to assistant, assistant to the next user."""

    USER, ASSISTANT, NEXT = "\u2402user\u2402", "\u2402assistant\u2402", "\u2402next\u2402"

    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer = tokenizer
        self.stop: int = tokenizer.eos_token_id
        self._cut: dict[str | None, tuple[str, str, str]] = {}

    def cut(self, system: str | None) -> tuple[str, str, str]:
        if system not in self._cut:
            messages = [] if system is None else [{"role": "system", "content": system}]
            messages += [
                {"role": "user", "content": self.USER},
                {"role": "assistant", "content": self.ASSISTANT},
                {"role": "user", "content": self.NEXT},
            ]
            text = self.tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
            head, rest = text.split(self.USER)
            middle, rest = rest.split(self.ASSISTANT)
            self._cut[system] = head, middle, rest.split(self.NEXT)[0]
        return self._cut[system]

    def turn(self, system: str | None, user: str, first: bool) -> str:
        """What comes between two answers, or before the first one, where the user says `user`."""
        head, middle, between = self.cut(system)
        return (head if first else between.removeprefix(self.decode([[self.stop]])[0])) + user + middle

    def encode(self, texts: list[str]) -> list[list[int]]:
        return self.tokenizer(texts, add_special_tokens=False)["input_ids"] if texts else []

    def decode(self, tokens: list[list[int]]) -> list[str]:
        return self.tokenizer.batch_decode(tokens, skip_special_tokens=False) if tokens else []


@dataclass
class Conversation:
    """What is known of a document while it is made."""

    system: str | None
    user: str
    source: int
    temperature: float
    tokens: list[int] = field(default_factory=list)
    spans: list[tuple[int, int]] = field(default_factory=list)

    def answered(self, prompt: list[int], answer: list[int]) -> None:
        """The conversation is now `prompt`, its latest tokens included, and the target's `answer`."""
        self.tokens = prompt + answer
        self.spans.append((len(prompt), len(self.tokens)))


class Synthesis:
    """Makes chunks of documents; a chunk depends on its number, the seed and the engine alone.

    sampled: share of answers that are; min_p: of these (what users say has MIN_P).
    """

    def __init__(
        self,
        engine: Engine,
        chat: ChatFormat,
        held_out: HeldOut,
        seed: int,
        progress: Progress,
        sampled: float = SAMPLED,
        min_p: float = MIN_P,
    ) -> None:
        self.engine, self.chat, self.held_out = engine, chat, held_out
        self.seed, self.progress = seed, progress
        self.sampled, self.min_p = sampled, min_p

    def chunk(self, number: int, count: int, given: list[tuple[str, float]]) -> list[Document]:
        """Documents from `count` synthetic prompts (fewer pass the filter) and the given (prompt, temperature)."""
        rng = np.random.default_rng((self.seed, number))
        self.round = number * 8  # of the engine's seeds
        talks = self._users(self._starts(rng, count))
        talks += [Conversation(self._system(rng), prompt, 1, temperature) for prompt, temperature in given]
        talks = self._fresh(talks)
        texts = self.texts(rng, int(count * TEXT_SHARE))
        asked = [self.chat.turn(t.system, t.user, first=True) for t in talks]
        self.answer(talks + texts, asked + [t.user for t in texts])
        self._second_turn(rng, talks)
        return [Document(t.tokens, t.spans, t.source) for t in talks + texts if t.spans]

    def begin(self, number: int) -> None:
        """Part `number` of what long.py makes: the engine's seeds follow from it."""
        self.round = LONG_ROUNDS + number * 64

    def conversation(self, rng: np.random.Generator, user: str, source: int) -> Conversation:
        """One yet to be answered, under one of the system prompts, at one of the temperatures."""
        return Conversation(self._system(rng), user, source, self._temperature(rng))

    def _generate(self, requests: list[Request]) -> list[list[int]]:
        self.round += 1
        return self.engine.generate(requests, self.chat.stop, self.seed * 100_003 + self.round, self.progress)

    def _temperature(self, rng: np.random.Generator) -> float:
        return float(rng.uniform(*SAMPLED_AT)) if rng.random() < self.sampled else 0.0

    def _system(self, rng: np.random.Generator) -> str | None:
        kind = rng.choice(3, p=SYSTEM_SHARES)
        return (None, "", str(rng.choice(lines("systems"))))[kind]

    def _starts(self, rng: np.random.Generator, count: int) -> list[Conversation]:
        """Conversations of which `user` is an opener yet to be continued."""
        openers, topics = lines("openers"), lines("topics")
        picks = zip(rng.integers(len(openers), size=count), rng.integers(len(topics), size=count), strict=True)
        return [
            Conversation(self._system(rng), openers[o].replace("{}", topics[t]), 0, self._temperature(rng))
            for o, t in picks
        ]

    def _users(self, talks: list[Conversation]) -> list[Conversation]:
        """Let the target finish what the user says; keep what ends and reads like a prompt."""
        prompts = self.chat.encode([self.chat.cut(t.system)[0] + t.user for t in talks])
        tails = self._generate([Request(p, 1.0, USER_TOKENS) for p in prompts])
        kept = []
        for talk, tail, text in zip(talks, tails, self.chat.decode([t[:-1] for t in tails]), strict=True):
            talk.user = (talk.user + text).strip()
            if tail[-1] == self.chat.stop and readable(talk.user):
                kept.append(talk)
        return kept

    def _fresh(self, talks: list[Conversation]) -> list[Conversation]:
        """Without held-out prompts, and without repeated ones but the given, which come at several temperatures."""
        seen, kept = set(), []
        for talk in talks:
            key = " ".join(words(talk.user))
            if (talk.source == 1 or key not in seen) and not self.held_out.holds(talk.user):
                seen.add(key)
                kept.append(talk)
        return kept

    def answer(self, talks: list[Conversation], texts: list[str], most: int = LONGEST_PROMPT) -> None:
        """Answer each conversation, of which `texts` are the tokens to come before the answer, at most so many."""
        prompts = [t.tokens + ids for t, ids in zip(talks, self.chat.encode(texts), strict=True)]
        short = [i for i, p in enumerate(prompts) if len(p) <= most + len(talks[i].tokens)]
        answers = self._generate(
            [Request(prompts[i], talks[i].temperature, ANSWER_TOKENS, self.min_p) for i in short]
        )
        for i, answer in zip(short, answers, strict=True):
            talks[i].answered(prompts[i], answer)

    def _second_turn(self, rng: np.random.Generator, talks: list[Conversation]) -> None:
        """Some conversations whose first answer ended get a second turn, the user's words the target's too."""
        ended = [t for t in talks if t.tokens and t.tokens[-1] == self.chat.stop and len(t.tokens) <= LONGEST_PROMPT]
        again = [t for t in ended if rng.random() < SECOND_TURN_SHARE]
        stop_text = self.chat.decode([[self.chat.stop]])[0]
        starts = [
            self.chat.cut(t.system)[2].removeprefix(stop_text) + str(rng.choice(lines("followups"))) for t in again
        ]
        prompts = [t.tokens + ids for t, ids in zip(again, self.chat.encode(starts), strict=True)]
        tails = self._generate([Request(p, 1.0, USER_TOKENS) for p in prompts])
        decoded = self.chat.decode([t[:-1] for t in tails])
        both = [
            (talk, (start + text).rstrip() + self.chat.cut(talk.system)[1])
            for talk, tail, start, text in zip(again, tails, starts, decoded, strict=True)
            if tail[-1] == self.chat.stop and not self.held_out.holds(text)
        ]
        self.answer([talk for talk, _ in both], [text for _, text in both])

    def texts(self, rng: np.random.Generator, count: int) -> list[Conversation]:
        """Raw text on our topics, outside of any chat: its beginnings, yet to be continued."""
        beginnings, topics = lines("beginnings"), lines("topics")
        picks = zip(rng.integers(len(beginnings), size=count), rng.integers(len(topics), size=count), strict=True)
        texts = [
            Conversation(None, beginnings[b].replace("{}", topics[t]), 2, self._temperature(rng)) for b, t in picks
        ]
        return self._fresh(texts)


def readable(prompt: str) -> bool:
    """Whether a synthetic prompt is one: neither empty nor endless, no template tokens, mostly plain letters."""
    plain = sum(c.isascii() for c in prompt)
    return 12 <= len(prompt) <= 1500 and "<|" not in prompt and plain > 0.9 * len(prompt) and len(words(prompt)) >= 3
