"""The page of a short answer of the embedded pair, and what it is drawn from."""

from __future__ import annotations

import re
import runpy
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer
from typer.testing import CliRunner

from sglang_dflash import embedded
from sglang_dflash.cli import app, load
from sglang_dflash.cli.explain_page import page
from sglang_dflash.training.explain import Explanation, explain

PROMPT = "Tom has 3 boxes with 12 pencils each. <script>alert(1)</script> How many has he?"
NODES, DEPTH, TOKENS = 7, 4, 20
OFFLINE = Path(__file__).parents[2] / "scripts" / "accept_length.py"
VOID = {"meta"}


@pytest.fixture(scope="module")
def tokenizer(pair: embedded.Pair) -> Any:
    return AutoTokenizer.from_pretrained(pair.target)


@pytest.fixture(scope="module")
def prompt(tokenizer: Any) -> list[int]:
    return load.chat_ids(tokenizer, PROMPT)


@pytest.fixture(scope="module")
def told(pair: embedded.Pair, prompt: list[int]) -> Explanation:
    return explain(pair.target, pair.draft, prompt, TOKENS, NODES, DEPTH)


class Reader(HTMLParser):
    """Holds a page's tags and text; an element closed out of turn fails."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.texts: list[tuple[str, str]] = []
        self.feed(text)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        self.open += [] if tag in VOID else [tag]

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.texts.append((self.open[-1] if self.open else "", data))


def test_steps_add_up_to_the_answer(told: Explanation) -> None:
    assert len(told.steps) > 2
    built = told.answer[:1]
    for step in told.steps:
        assert (step.at, step.bonus) == (len(built) - 1, built[-1])
        path = [node.token for node in step.nodes if node.accepted]
        assert len(path) == step.accepted
        built += path + ([] if step.own is None else [step.own])
        assert len(step.nodes) == NODES
        assert max(node.depth for node in step.nodes) <= DEPTH
    assert built == told.answer
    assert 1 + sum(step.emitted for step in told.steps) == len(told.answer) == len(told.target_p)
    assert sum(told.accepted_at()) == sum(step.accepted for step in told.steps) > 0


def test_accept_length_is_what_a_second_computation_says(
    told: Explanation, pair: embedded.Pair, prompt: list[int]
) -> None:
    rows = [{"prompt": prompt, "answer": told.answer}]
    kinds = {"tree": (NODES, DEPTH)}
    lengths = runpy.run_path(str(OFFLINE))["accept_lengths"](pair.target, pair.draft, rows, kinds)
    assert told.accept_length == pytest.approx(lengths["tree"])


def test_where_draft_and_target_part(told: Explanation) -> None:
    parted = [step for step in told.steps if step.candidates]
    assert parted
    for step in parted:
        assert step.own is not None
        found = [i for i, c in enumerate(step.candidates, 1) if c.token == step.own]
        assert [step.rank] == (found or [None])
        assert not any(c.drafted for c in step.candidates if c.token == step.own), "else it had been accepted"
        assert sum(c.draft_p for c in step.candidates) <= 1.0001
        assert step.own_p == pytest.approx(told.target_p[step.at + step.emitted])
        assert all(c.target_p <= step.own_p for c in step.candidates), "the target's own token is its likeliest"
        last = max((i for i, node in enumerate(step.nodes) if node.accepted), default=-1)
        children = {node.token: node.p for node in step.nodes if node.parent == last}
        assert children == pytest.approx({c.token: c.draft_p for c in step.candidates if c.drafted}, rel=1e-3)


def test_page_is_whole_and_loads_nothing(told: Explanation, tokenizer: Any) -> None:
    text = page(told, PROMPT, "my/<target>", "draft", tokenizer)
    read = Reader(text)
    assert read.open == []
    assert not re.search(r"//|url\(|@import", text), "no address anywhere"
    tags = [tag for tag, _ in read.tags]
    assert not {"script", "link", "img", "iframe"} & set(tags)
    assert tags.count("article") == len(told.steps)
    for name in ("href", "src"):
        links = [attrs[name] for _, attrs in read.tags if name in attrs]
        ids = {f"#{attrs['id']}" for _, attrs in read.tags if "id" in attrs}
        assert set(links) <= ids
    assert ("h1", PROMPT) in read.texts
    assert ("code", "my/<target>") in read.texts
    boxes = [attrs for tag, attrs in read.tags if tag == "g" and (attrs.get("class") or "").startswith("box")]
    own = sum(step.own is not None for step in told.steps)
    assert len(boxes) == len(told.steps) * (1 + NODES) + own
    assert sum(attrs["class"] == "box accepted" for attrs in boxes) == sum(step.accepted for step in told.steps)


def test_answer_stands_in_the_page_token_by_token(told: Explanation, tokenizer: Any) -> None:
    text = page(told, PROMPT, "target", "draft", tokenizer)
    shown = text[text.index('<div class="answer">') : text.index("</section>\n<section class=\"charts\">")]
    spoken = "".join(data for tag, data in Reader(shown).texts if tag in ("a", "span"))
    assert spoken == tokenizer.decode(told.answer, skip_special_tokens=True)
    assert shown.count('class="accepted"') == sum(step.accepted for step in told.steps)


def test_command_writes_the_page(tmp_path: Path) -> None:
    out = tmp_path / "page.html"
    args = ["explain", "What is 2 + 2?", "--max-tokens", "3", "--nodes", "31", "--out", str(out)]
    result = CliRunner().invoke(app, args, env={"COLUMNS": "200"})
    assert result.exit_code == 0, result.output
    assert "tokens in" in result.output
    assert "<b>31</b>nodes" in out.read_text()
    assert "<b>15</b>depth" in out.read_text(), "as on a server"


def test_a_draft_of_another_kind(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    args = ["explain", "Hi", "--draft", str(tmp_path), "--out", str(tmp_path / "page.html")]
    result = CliRunner().invoke(app, args, env={"COLUMNS": "400"})
    assert result.exit_code == 2
    assert "is no draft of the kinds that training makes" in result.output


def test_a_depth_beyond_the_drafts_block(tmp_path: Path) -> None:
    args = ["explain", "Hi", "--max-tokens", "1", "--depth", "16", "--out", str(tmp_path / "page.html")]
    result = CliRunner().invoke(app, args, env={"COLUMNS": "200"})
    assert result.exit_code == 2
    assert "give at most 15" in result.output
