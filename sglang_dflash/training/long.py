"""Conversations as long as those that are served: lists of questions, documents, and many turns.

Every answer is the target's own, given all that came before it. Questions are prompts as `synth` makes or is given
them; documents are the target's own raw texts, one behind the other.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np

from sglang_dflash.training.data import Document
from sglang_dflash.training.synth import ANSWER_TOKENS, SOURCES, ChatFormat, Conversation, Synthesis

SHARES = {"list": 0.3, "document": 0.3, "talk": 0.4}
TURNS = {"list": 3, "document": 3, "talk": 12}  # at most
SHORTEST = 100  # tokens of a first message of "list" or "document"
ASKED = (
    "Summarise the text above in a few sentences.",
    "What is the text above about? Explain it to a beginner.",
    "List the most important points of the text above.",
    "What does the text above say first, and what does it say last?",
    "Write three questions about the text above, and answer them.",
    "Continue the text above with one more paragraph.",
)


class Texts:
    """Texts to put together, and how many tokens each has."""

    def __init__(self, texts: list[str], chat: ChatFormat) -> None:
        self.texts = texts
        self.sizes = np.array([len(ids) for ids in chat.encode(texts)]) + 4  # a number, a line's end

    def some(self, tokens: float, rng: np.random.Generator) -> list[str]:
        """Random ones, as many as come to so many tokens, one at least."""
        order = rng.permutation(len(self.texts))
        count = int(np.searchsorted(self.sizes[order].cumsum(), tokens))
        return [self.texts[i] for i in order[: max(1, count)]]


@dataclass(frozen=True)
class Pool:
    questions: Texts
    paragraphs: Texts

    def messages(self, kind: str, tokens: float, turns: int, rng: np.random.Generator) -> list[str]:
        """What the user says, turn by turn; a first message of "list" or "document" has about so many tokens."""
        if kind == "talk":
            return [str(q) for q in rng.choice(self.questions.texts, turns)]
        if kind == "document":
            asked = [str(a) for a in rng.permutation(ASKED)[:turns]]
            return ["\n\n".join([*self.paragraphs.some(tokens, rng), asked[0]]), *asked[1:]]
        questions = self.questions.some(tokens, rng)
        if len(questions) == 1:
            return questions
        which = rng.permutation(len(questions))[:turns] + 1
        lines = "\n".join(f"{n}. {question}" for n, question in enumerate(questions, start=1))
        first = f"Here are some questions.\n{lines}\nAnswer question {which[0]}."
        return [first, *(f"Now answer question {n}." for n in which[1:])]


def pool(making: Synthesis, number: int, questions: Iterable[str], paragraphs: int) -> Pool:
    """Of questions that nothing held out is like, and of so many texts that the target writes."""
    making.begin(number)
    texts = making.texts(np.random.default_rng((making.seed, number, 1)), paragraphs)
    making.answer(texts, [t.user for t in texts])
    kept = [q for q in questions if not making.held_out.holds(q)]
    written = [text.strip() for text in making.chat.decode([t.tokens for t in texts if t.spans])]
    stop = making.chat.decode([[making.chat.stop]])[0]
    return Pool(Texts(kept, making.chat), Texts([text.removesuffix(stop) for text in written], making.chat))


def long_chunk(making: Synthesis, number: int, count: int, of: Pool, longest: int) -> list[Document]:
    """`count` conversations of up to `longest` tokens, their lengths spread evenly on a logarithmic scale."""
    rng = np.random.default_rng((making.seed, number, 2))
    making.begin(number)
    talks, said = [], []
    for kind in rng.choice(list(SHARES), count, p=list(SHARES.values())):
        tokens = np.exp(rng.uniform(np.log(SHORTEST), np.log(longest - 2 * ANSWER_TOKENS)))
        said.append(of.messages(str(kind), tokens, TURNS[str(kind)], rng))
        talks.append(making.conversation(rng, said[-1][0], SOURCES.index(str(kind))))
    for turn in range(max(TURNS.values())):
        one_more_turn(making, talks, said, turn, longest)
    return [Document(t.tokens, t.spans, t.source) for t in talks if t.spans]


def one_more_turn(
    making: Synthesis, talks: list[Conversation], said: list[list[str]], turn: int, longest: int
) -> list[Conversation]:
    """Answer message `turn` of every conversation that has one, whose last answer ended, and that has room for it."""
    chat, ended = making.chat, []
    for talk, messages in zip(talks, said, strict=True):
        going = not talk.tokens if turn == 0 else len(talk.spans) == turn and talk.tokens[-1] == chat.stop
        if going and turn < len(messages):
            ended.append((talk, chat.turn(talk.system, messages[turn], first=turn == 0)))
    sizes = [len(ids) for ids in chat.encode([text for _, text in ended])]
    fit = [
        both
        for both, size in zip(ended, sizes, strict=True)
        if len(both[0].tokens) + size + ANSWER_TOKENS <= longest
    ]
    making.answer([talk for talk, _ in fit], [text for _, text in fit], longest)
    return [talk for talk, _ in fit]


def held_out(
    making: Synthesis, of: Pool, lengths: list[int], turns: list[int], count: int, longest: int
) -> tuple[list[Document], list[str]]:
    """Greedy answers to set-aside questions, `count` a source, and the sources: lists and documents of about so many
    tokens, and conversations by turn. Of each the last answer alone counts as one.
    """
    rng = np.random.default_rng((making.seed, 3))
    names = [f"{kind} {length}" for kind in ("list", "document") for length in lengths]
    singles, said = [], []
    for source, name in enumerate(names * count):
        kind, length = name.split()
        said.append(of.messages(kind, int(length) - 60, 1, rng))
        singles.append(Conversation(None, said[-1][0], source % len(names), 0.0))
    one_more_turn(making, singles, said, 0, longest)
    made = [Document(t.tokens, t.spans, t.source) for t in singles if t.spans]
    said = [of.messages("talk", 0, max(turns), rng) for _ in range(count)]
    talks = [Conversation(None, messages[0], 0, 0.0) for messages in said]
    for turn in range(max(turns)):
        answered = one_more_turn(making, talks, said, turn, longest)
        if turn + 1 in turns:
            names.append(f"turn {turn + 1}")
            made += [Document(t.tokens, t.spans[-1:], len(names) - 1) for t in answered]
    return made, names
