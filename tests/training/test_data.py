"""Shards, packing, resuming; and synthesis with an engine that needs no model."""

from __future__ import annotations

import json
import re
import zlib
from collections import Counter
from collections.abc import Callable
from itertools import groupby, islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from sglang_dflash.training import long
from sglang_dflash.training.data import Answers, Batch, Cursor, Document, batches, pack, write_shard
from sglang_dflash.training.generate import MIN_P, Progress, Request, SGLangEngine
from sglang_dflash.training.synth import (
    ANSWER_TOKENS,
    SOURCES,
    USER_TOKENS,
    ChatFormat,
    HeldOut,
    Synthesis,
    lines,
    readable,
    varied,
)

Make = Callable[..., Answers]


def documents_of(batch: Batch) -> list[list[int]]:
    rows = zip(batch.tokens, batch.document, strict=True)
    return [tokens[which == d].tolist() for tokens, which in rows for d in which.unique() if d >= 0]


def test_packing_keeps_documents_whole_and_answers_marked(make_answers: Make) -> None:
    answers = make_answers(20)
    batch, used = pack(answers, np.arange(20), rows=3, width=64)
    expected = [answers.tokens[answers.starts[d] : answers.starts[d + 1]].tolist() for d in range(used)]
    assert 3 <= used < 20 and sorted(documents_of(batch)) == sorted(expected)
    for row in range(3):
        for at in range(64):
            document = int(batch.document[row, at])
            if document < 0:
                assert not batch.answer[row, at]
                continue
            source = answers.starts[document] + at - int(batch.starts[row, at])
            assert batch.tokens[row, at] == answers.tokens[source]
            assert batch.answer[row, at] == answers.answer[source]


def test_a_row_is_filled_with_what_no_earlier_one_had_room_for(tmp_path: Path) -> None:
    sizes = [50, 40, 30, 20, 10, 60, 5]
    write_shard(tmp_path / "shard-00000.npz", [Document([i] * size, [(0, size)], 0) for i, size in enumerate(sizes)])
    (tmp_path / "manifest.json").write_text(json.dumps({"sources": ["all"]}))
    answers = Answers(tmp_path)
    batch, used = pack(answers, np.arange(7), rows=2, width=80)
    assert answers.longest == 60 and used == 5  # the sixth has no row
    rows = [[len(list(same)) for _, same in groupby(row.tolist())] for row in batch.document]
    assert rows == [[50, 30], [40, 20, 10, 10]] and batch.document[1, -1] == -1  # the last are padding
    assert batch.starts[0, 50:].unique().tolist() == [50] and batch.starts[1, 70:].unique().tolist() == [70]


def test_resuming_gives_the_batches_that_would_have_come(make_answers: Make) -> None:
    answers = make_answers(30)
    whole = list(islice(batches(answers, 2, 64, seed=3, cursor=Cursor()), 25))
    assert whole[-1][1].epoch > 1
    for stop in (1, 7, 20):
        rest = list(islice(batches(answers, 2, 64, seed=3, cursor=whole[stop - 1][1]), 25 - stop))
        assert all(torch.equal(a.tokens, b.tokens) for (a, _), (b, _) in zip(rest, whole[stop:], strict=True))


def test_ranks_share_an_epoch_without_overlap(make_answers: Make) -> None:
    answers, seen = make_answers(31), []
    for rank in range(2):
        for batch, cursor in batches(answers, 2, 64, 0, Cursor(), rank, 2):
            if cursor.epoch:
                break
            seen += [d for d in batch.document.unique().tolist() if d >= 0]
    assert sorted(seen) == list(range(31))


class Words:
    """A tokenizer of characters, with a chat template."""

    eos_token_id = 1

    def __call__(self, texts: list[str], add_special_tokens: bool) -> dict[str, list[list[int]]]:
        return {"input_ids": [[1 if c == "$" else ord(c) for c in text] for text in texts]}

    def batch_decode(self, tokens: list[list[int]], skip_special_tokens: bool) -> list[str]:
        return ["".join("$" if t == 1 else chr(t) for t in row) for row in tokens]

    def apply_chat_template(self, messages: list[dict], tokenize: bool, add_generation_prompt: bool) -> str:
        return "".join(f"[{m['role']}]{m['content']}$\n" for m in messages) + "[assistant]"


class Echo:
    """Answers with a few words that depend on the prompt, the temperature and the seed alone."""

    def generate(self, requests: list[Request], stop: int, seed: int, progress: Progress) -> list[list[int]]:
        def answer(r: Request) -> list[int]:
            number = zlib.crc32(bytes(t % 256 for t in r.prompt)) + (seed if r.temperature else 0)
            return [*map(ord, f" words number {number} and more"), stop]

        return [answer(r) for r in requests]


def synthesis(held_out: list[str]) -> Synthesis:
    return Synthesis(Echo(), ChatFormat(Words()), HeldOut(held_out), 0, lambda _: None)


def test_a_chunk_made_again_is_the_same_and_another_is_not() -> None:
    given = [("How far is the moon, roughly?", 0.0)] * 3
    first, again = (synthesis([]).chunk(2, 40, given) for _ in range(2))
    assert first == again
    assert [d.tokens for d in synthesis([]).chunk(3, 40, given)] != [d.tokens for d in first]
    assert {d.source for d in first} == {0, 1, 2} and any(len(d.spans) == 2 for d in first)


@pytest.mark.parametrize(("sampled", "min_p"), [(0.0, 0.02), (0.5, 0.0)])
def test_so_many_answers_are_sampled(sampled: float, min_p: float) -> None:
    asked: list[Request] = []

    class Listening(Echo):
        def generate(self, requests: list[Request], *others: Any) -> list[list[int]]:
            asked.extend(requests)
            return super().generate(requests, *others)

    making = Synthesis(Listening(), ChatFormat(Words()), HeldOut([]), 0, lambda _: None, sampled, min_p)
    making.chunk(0, 400, [])
    answers = [r for r in asked if r.max_new == ANSWER_TOKENS]
    hot = [r.temperature for r in answers if r.temperature]
    assert abs(len(hot) / len(answers) - sampled) < 0.1 and all(0.6 <= t <= 1 for t in hot)
    assert {r.min_p for r in answers} == {min_p}
    assert {(r.temperature, r.min_p) for r in asked if r.max_new == USER_TOKENS} == {(1.0, MIN_P)}


def test_spans_cover_what_the_engine_said_and_nothing_else() -> None:
    for document in synthesis([]).chunk(0, 40, []):
        text = Words().batch_decode([document.tokens], False)[0]
        for start, end in document.spans:
            assert text[start:end].startswith(" words number") and text[start:end].endswith("more$")
        if document.source == 0:
            assert all(text[:start].endswith("[assistant]") for start, _ in document.spans)


def test_held_out_prompts_and_their_likes_are_kept_out() -> None:
    held = HeldOut(["Write a short poem about a lighthouse keeper who is afraid."])
    assert held.holds("write a short poem about a LIGHTHOUSE keeper who is afraid")
    assert held.holds("Please write a short poem about a lighthouse keeper, will you?")
    assert not held.holds("Write a short poem about a sailor who is afraid of the lighthouse.")
    given = [("Write a short poem about a lighthouse keeper who is afraid.", 0.0), ("What is rain made of?", 0.0)]
    made = synthesis(["Write a short poem about a lighthouse keeper who is afraid."]).chunk(0, 0, given)
    assert len(made) == 1 and "rain" in Words().batch_decode([made[0].tokens], False)[0]


def test_varied_prompts_are_the_given_ones_with_other_numbers() -> None:
    prompts = ["Ann has 12 apples and gives Ben 5. How many of the 12 are left?", "Why 7?", "Why?"]
    made = varied(prompts, 20, seed=1)
    assert made == varied(prompts, 20, seed=1) and len(made) == 20 and len(set(made)) > 15
    for prompt in made:
        found = re.fullmatch(r"Ann has (\d\d) apples and gives Ben \d. How many of the (\d\d) are left\?", prompt)
        assert found and found[1] == found[2]


def test_prompt_lists_are_distinct_and_prompts_filtered() -> None:
    for name in ("openers", "topics", "systems", "followups", "beginnings"):
        assert len(lines(name)) == len(set(lines(name))) > 15
    assert readable("What is rain made of?")
    assert not any(map(readable, ("Hi", "What is <|im_start|> then?", "Что такое дождь и откуда он?")))


QUESTIONS = [f"What is number {i} made of, and why?" for i in range(60)]
LONGEST = 3000  # characters, to this tokenizer


def test_long_conversations_are_of_every_kind_and_length(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(long, "ANSWER_TOKENS", 60)
    making = synthesis([QUESTIONS[7]])
    of = long.pool(making, 0, QUESTIONS, 40)
    assert len(of.questions.texts) == 59 and 20 < len(of.paragraphs.texts) <= 40
    made, again = (long.long_chunk(making, 1, 60, of, LONGEST) for _ in range(2))
    assert made == again and made != long.long_chunk(making, 2, 60, of, LONGEST)
    assert {SOURCES[d.source] for d in made} == {"list", "document", "talk"}
    sizes = sorted(len(d.tokens) for d in made)
    assert sizes[0] < 600 and LONGEST * 0.7 < sizes[-1] <= LONGEST
    assert max(len(d.spans) for d in made) == 12  # the turns of a talk
    for document in made:
        text = Words().batch_decode([document.tokens], False)[0]
        assert QUESTIONS[7] not in text
        for start, end in document.spans:
            assert text[:start].endswith("[assistant]") and text[start:end].startswith(" words number")
            assert text[end - 1] == "$"
        assert text.count("[assistant]") == len(document.spans)  # every answer is the target's, and marked
        if SOURCES[document.source] == "list" and "Answer question" in text:
            assert len(re.findall(r"^\d+\. What is number", text, re.MULTILINE)) > 1


def test_of_a_conversation_set_aside_the_last_answer_alone_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(long, "ANSWER_TOKENS", 60)
    making = synthesis([])
    of = long.pool(making, 0, QUESTIONS, 40)
    made, names = long.held_out(making, of, [200, 900], [1, 3], 4, LONGEST)
    assert names == ["list 200", "list 900", "document 200", "document 900", "turn 1", "turn 3"]
    assert Counter(names[d.source] for d in made) == dict.fromkeys(names, 4)
    for document in made:
        text = Words().batch_decode([document.tokens], False)[0]
        turns = 3 if names[document.source] == "turn 3" else 1
        assert text.count("[assistant]") == turns and document.spans == [(text.rindex("[assistant]") + 11, len(text))]
    for name in names[:4]:
        lengths = [d.spans[0][0] for d in made if names[d.source] == name]
        assert 0.5 < np.mean(lengths) / int(name.split()[1]) < 1.3


def test_sglang_is_not_asked_for_nothing() -> None:
    """It refuses an empty batch, and of a small chunk no conversation may go on."""
    nobody = SGLangEngine.__new__(SGLangEngine)
    assert nobody.generate([], stop=2, seed=0, progress=lambda _: None) == []
