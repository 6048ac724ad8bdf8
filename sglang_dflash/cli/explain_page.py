"""The page that `sglang-dflash explain` writes: one HTML file, trees as inline SVG, nothing loaded from anywhere."""

from __future__ import annotations

from collections import Counter
from html import escape
from importlib import resources
from typing import TYPE_CHECKING, Any

from sglang_dflash.cli.demo import texts

if TYPE_CHECKING:  # it imports torch
    from sglang_dflash.training.explain import Candidate, Explanation, Node, Step

SHOWN = 5  # candidates listed at a parting
LONGEST = 14  # characters of a token's label
ROW, BOX, CHAR, EDGE = 31, 22, 7.3, 44  # pixels: a leaf's height, a box's, a character's width, an edge's
BARS = 130  # pixels of the highest bar


def page(told: Explanation, prompt: str, target: str, draft: str, tokenizer: Any) -> str:
    """The whole page; the names of target and draft are the user's."""
    label = Label(tokenizer)
    steps = "".join(_step(i, step, label, told.top_k) for i, step in enumerate(told.steps, 1))
    length = told.accept_length
    facts = [
        ("accept length", f"{length:.2f}" if length else "–", "tokens a step, the first one aside"),
        ("tokens", str(len(told.answer)), "with the one that ends it"),
        ("steps", str(len(told.steps)), "passes of the target after the prompt's"),
        ("nodes", str(told.nodes), "drafted tokens a tree"),
        ("depth", str(told.depth), "drafted positions"),
    ]
    cards = "".join(
        f'<div class="card" title="{escape(note)}"><b>{escape(value)}</b>{escape(name)}</div>'
        for name, value, note in facts
    )
    style = resources.files("sglang_dflash").joinpath("data/explain.css").read_text(encoding="utf-8")
    return f"""<!DOCTYPE html>
<html lang="en">
<head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">
<title>DFLASH: {escape(prompt[:60])}</title>
<style>{style}</style></head>
<body>
<header><h1>{escape(prompt)}</h1>
<p class="models">target <code>{escape(target)}</code> · draft <code>{escape(draft)}</code> · greedy, float32</p>
<div class="cards">{cards}</div></header>
<section><h2>The answer</h2>
<p class="legend"><span class="accepted">drafted and accepted</span> <span class="own">the target's own</span>
<span class="note">hover for step and probabilities; click for the step</span></p>
<div class="answer">{_answer(told, tokenizer)}</div></section>
<section class="charts"><figure><h2>Accepted by depth</h2>{_by_depth(told)}
<figcaption>share of steps that accepted a drafted token so deep</figcaption></figure>
<figure><h2>Why steps ended</h2>{_reasons(told)}
<figcaption>not among the candidates: a better draft would help; not in the tree: more nodes would</figcaption></figure>
</section>
<section><h2>Step by step</h2>
<p class="note">Left to right: the last emitted token, then what was drafted behind it, with the draft's probability of
each token after those before it. The upper row is the answer; the dashed box is the target's own token there, with the
target's probability.</p>
{steps}</section>
</body></html>
"""


class Label:
    """A token as a short label in one line, and whole."""

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer

    def whole(self, token: int) -> str:
        """With its blanks made visible."""
        text = self._tokenizer.decode([token])
        return text.replace(" ", "·").replace("\n", "⏎").replace("\t", "⇥") or f"<{token}>"

    def short(self, token: int) -> str:
        text = self.whole(token)
        return text if len(text) <= LONGEST else text[: LONGEST - 1] + "…"


def percent(p: float) -> str:
    """`7%`, and `<1%` where that would be 0%."""
    return "<1%" if p < 0.005 else f"{p:.0%}"


def _answer(told: Explanation, tokenizer: Any) -> str:
    """The answer's text, each token a link to its step."""
    where = {0: (0, 0)}  # token -> step, depth; depth 0: the target's own
    for i, step in enumerate(told.steps, 1):
        for depth in range(1, step.emitted + 1):
            where[step.at + depth] = (i, depth if depth <= step.accepted else 0)
    parts = []
    for at, text in enumerate(texts(tokenizer, told.answer)):
        (step_number, depth), target = where[at], f"target {told.target_p[at]:.3f}"
        if not step_number:
            parts.append(f'<span class="own" title="the prompt\'s pass · {target}">{escape(text)}</span>')
            continue
        kind = "accepted" if depth else "own"
        drafted = ""
        if depth:
            path = [n for n in told.steps[step_number - 1].nodes if n.accepted]
            drafted = f" · drafted at depth {depth}, draft {path[depth - 1].p:.3f}"
        title = f"step {step_number}{drafted} · {target}"
        parts.append(f'<a class="{kind}" href="#step-{step_number}" title="{title}">{escape(text)}</a>')
    return "".join(parts)


def _by_depth(told: Explanation) -> str:
    """A bar a depth."""
    bars, wide, total = [], max(30, 440 // told.depth), max(len(told.steps), 1)
    for i, count in enumerate(told.accepted_at()):
        high, x = BARS * count / total, i * wide + 6
        bars.append(
            f"<g><title>depth {i + 1}: {count} of {len(told.steps)} steps</title>"
            f'<rect class="bar" x="{x}" y="{BARS - high + 20:.1f}" width="{wide - 12}" height="{high:.1f}" rx="3"/>'
            f'<text x="{x + wide / 2 - 6}" y="{BARS - high + 14:.1f}">{count / total:.0%}</text>'
            f'<text class="faint" x="{x + wide / 2 - 6}" y="{BARS + 38}">{i + 1}</text></g>'
        )
    width = told.depth * wide
    return (
        f'<svg class="chart" width="{width}" height="{BARS + 46}" viewBox="0 0 {width} {BARS + 46}" role="img" '
        f'aria-label="acceptance by depth">{"".join(bars)}'
        f'<line x1="0" x2="{width}" y1="{BARS + 20.5}" y2="{BARS + 20.5}"/></svg>'
    )


def _reasons(told: Explanation) -> str:
    counts = Counter(step.why for step in told.steps)
    rows = "".join(
        f"<span>{escape(why)}</span>"
        f'<i class="meter"><i class="draft" style="width:{count / len(told.steps):.1%}"></i></i><span>{count}</span>'
        for why, count in counts.most_common()
    )
    return f'<div class="reasons">{rows}</div>'


def _step(number: int, step: Step, label: Label, top_k: int) -> str:
    tokens = [*(n.token for n in step.nodes if n.accepted), *([] if step.own is None else [step.own])]
    said = "".join(label.whole(token) for token in tokens)
    count = f"{step.emitted} token{'s' if step.emitted > 1 else ''}"
    return (
        f'<article class="step" id="step-{number}"><h3>Step {number} <span>{count}</span> '
        f"<code>{escape(said)}</code></h3>"
        f'<div class="inside"><div class="tree">{_tree(step, label)}</div>{_parting(step, label, top_k)}</div>'
        "</article>"
    )


def _parting(step: Step, label: Label, top_k: int) -> str:
    """What draft and target thought where the step ended."""
    if step.own is None or step.own_p is None:
        return '<div class="parting"><p>The answer ends within the tree.</p></div>'
    own = f"<b>{escape(label.whole(step.own))}</b>"
    if not step.candidates:
        return (
            '<div class="parting"><p>All positions were accepted: the tree is no deeper. The target went on with '
            f"{own} ({percent(step.own_p)}).</p></div>"
        )
    if step.rank is None:
        rank = f"It is not among the draft's {top_k} candidates."
    else:
        rank = f"The draft had it at rank {step.rank} of {top_k}, but no node was left for it."
    listed = step.candidates[:SHOWN]
    if step.rank is not None and step.rank > SHOWN:
        listed = [*listed, step.candidates[step.rank - 1]]
    rows = "".join(_candidate(c, c.token == step.own, label) for c in listed)
    if step.rank is None:
        rows += (
            f'<span class="token own">{escape(label.short(step.own))}</span>'
            f'<span class="note">not offered</span>{_meter("target", step.own_p)}'
        )
    return (
        f'<div class="parting"><p>The target said {own} ({percent(step.own_p)}). {rank}</p>'
        f'<div class="offered"><span></span><span class="note">draft</span><span class="note">target</span>{rows}</div>'
        "</div>"
    )


def _candidate(candidate: Candidate, own: bool, label: Label) -> str:
    kind = "own" if own else "node" if candidate.drafted else "left"
    title = f"{label.whole(candidate.token)}: " + ("a node of the tree" if candidate.drafted else "no node")
    return (
        f'<span class="token {kind}" title="{escape(title)}">{escape(label.short(candidate.token))}</span>'
        f"{_meter('draft', candidate.draft_p)}{_meter('target', candidate.target_p)}"
    )


def _meter(kind: str, p: float) -> str:
    return (
        f'<span class="p" title="{kind} {p:.4f}"><i class="meter"><i class="{kind}" style="width:{p:.1%}"></i></i>'
        f"{percent(p)}</span>"
    )


class Box:
    """A token of a drawn tree. p: on the edge before it."""

    def __init__(self, text: str, title: str, kind: str, depth: int, p: float | None = None) -> None:
        self.text, self.title, self.kind, self.depth, self.p = text, title, kind, depth, p
        self.children: list[Box] = []
        self.row = 0
        self.width = len(text) * CHAR + 16


def _tree(step: Step, label: Label) -> str:
    root, boxes = _boxes(step, label)
    rows = _place(root, 0)
    widths = [max(b.width for b in boxes if b.depth == depth) for depth in range(max(b.depth for b in boxes) + 1)]
    lefts = [1.0]
    for width in widths:
        lefts.append(lefts[-1] + width + EDGE)
    ends = sorted(((box, child) for box in boxes for child in box.children), key=lambda end: end[1].row, reverse=True)
    edges = "".join(_edge(box, child, lefts) for box, child in ends)  # the answer's row is drawn last, over the others
    drawn = "".join(_drawn(box, lefts[box.depth]) for box in boxes)
    width, height = lefts[-1] - EDGE + 2, rows * ROW
    return (
        f'<svg width="{width:.0f}" viewBox="0 0 {width:.0f} {height}" style="min-width:{0.8 * width:.0f}px" role="img" '
        f'aria-label="the step\'s tree">{edges}{drawn}</svg>'
    )


def _boxes(step: Step, label: Label) -> tuple[Box, list[Box]]:
    """The root, and all boxes: nodes, and the target's own token. The answer's way is every box's first child."""
    root = Box(label.short(step.bonus), f"{label.whole(step.bonus)}: the last emitted token", "root", 0)
    nodes = [_node_box(node, label) for node in step.nodes]
    last = root
    for box, node in zip(nodes, step.nodes, strict=True):
        siblings = (nodes[node.parent] if node.parent >= 0 else root).children
        siblings.insert(0 if node.accepted else len(siblings), box)
        last = box if node.accepted else last
    boxes = [root, *nodes]
    if step.own is not None and step.own_p is not None:
        title = f"{label.whole(step.own)}: the target's own, p {step.own_p:.4f}"
        boxes.append(Box(label.short(step.own), title, "own", last.depth + 1, step.own_p))
        last.children.insert(0, boxes[-1])
    return root, boxes


def _node_box(node: Node, label: Label) -> Box:
    title = f"{label.whole(node.token)}: depth {node.depth}, draft {node.p:.4f} after its path"
    kind = "accepted" if node.accepted else "node"
    return Box(label.short(node.token), title, kind, node.depth, node.p)


def _place(box: Box, row: int) -> int:
    """Give rows to a box and all below it, a box its first child's; the row after them."""
    box.row = row
    if not box.children:
        return row + 1
    for child in box.children:
        row = _place(child, row)
    return row


def _edge(box: Box, child: Box, lefts: list[float]) -> str:
    x0, y0 = lefts[box.depth] + box.width, box.row * ROW + ROW / 2
    x1, y1 = lefts[child.depth], child.row * ROW + ROW / 2
    p = child.p or 0.0
    turn = x1 - EDGE * 0.75  # boxes of a column differ in width: edges bend in the gap before the next one
    bend = f"C{turn + 8:.1f} {y0} {turn:.1f} {y1} {turn + 14:.1f} {y1}"
    way = f"M{x0:.1f} {y0} L{turn - 8:.1f} {y0} {bend} L{x1:.1f} {y1}"
    return (
        f'<path class="edge {child.kind}" d="{way}" stroke-width="{1 + 2.5 * p:.1f}"/>'
        f'<text class="p {child.kind}" x="{x1 - 5:.1f}" y="{y1 - 5}">{percent(p)}</text>'
    )


def _drawn(box: Box, left: float) -> str:
    y = box.row * ROW + ROW / 2
    return (
        f'<g class="box {box.kind}"><title>{escape(box.title)}</title>'
        f'<rect x="{left:.1f}" y="{y - BOX / 2}" width="{box.width:.1f}" height="{BOX}" rx="6"/>'
        f'<text x="{left + box.width / 2:.1f}" y="{y + 4}">{escape(box.text)}</text></g>'
    )
