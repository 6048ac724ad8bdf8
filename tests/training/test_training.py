"""What a block sees, what the loss is, and that training learns, resumes and saves."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from sglang_dflash.training import attention, draft, step
from sglang_dflash.training import loss as losses_of
from sglang_dflash.training.data import Answers, Batch, Cursor, batches, pack
from sglang_dflash.training.draft import Draft, DraftShape
from sglang_dflash.training.loss import Soft, dpace_weights, draw, frozen_head_loss, static_weights
from sglang_dflash.training.optimizer import Muon
from sglang_dflash.training.target import Target
from sglang_dflash.training.train import Recipe, Training, train

Make = Callable[..., Answers]
SHAPE = DraftShape(layers=2, features=(0, 1), block=6, intermediate=48, rank=8, candidates=4)


def block_of(target: Target, network: Draft, batch: Batch, anchors: list[int]) -> torch.Tensor:
    """Hidden states of the block at the first anchor, the others there beside it."""
    context = step.features(target, batch, list(network.shape.features))
    return step.draft_hidden(network, target, batch, torch.tensor([anchors]), context)[0, 0]


def reaches(target: Target, make_answers: Make, causal: bool) -> dict[str, bool]:
    """Whether a block notices a change of: the past, its own future targets, another block, another document."""
    shape = DraftShape(**{**vars(SHAPE), "causal": causal})
    torch.manual_seed(0)
    network = Draft(shape, target.config)
    answers = make_answers(6, seed=int(causal) + 1)
    batch, _ = pack(answers, torch.arange(6).numpy(), 1, 160)
    first = int((batch.document == 1).nonzero()[0, 1])
    anchor = first + 11
    before = block_of(target, network, batch, [anchor, anchor + 3])

    def changed(at: int) -> Batch:
        tokens = batch.tokens.clone()
        tokens[0, at] = (tokens[0, at] + 7) % 61
        return Batch(tokens, batch.starts, batch.answer, batch.document)

    after = {
        "past": block_of(target, network, changed(anchor - 2), [anchor, anchor + 3]),
        "future": block_of(target, network, changed(anchor + 1), [anchor, anchor + 3]),
        "block": block_of(target, network, batch, [anchor, anchor + 9]),
        "document": block_of(target, network, changed(first - 1), [anchor, anchor + 3]),
    }
    return {name: not torch.allclose(before, hidden, atol=1e-6) for name, hidden in after.items()}


SEALED = {"past": True, "future": False, "block": False, "document": False}


@pytest.mark.parametrize("causal", [True, False])
def test_a_block_sees_its_past_alone(target: Target, make_answers: Make, causal: bool) -> None:
    assert reaches(target, make_answers, causal) == SEALED


@pytest.mark.parametrize("window", [1, 5, 11, 12, 40])
def test_a_window_is_of_the_last_tokens_and_not_one_more_or_less(
    target: Target, make_answers: Make, window: int
) -> None:
    """At lengths of the context below, at and above it."""
    torch.manual_seed(0)
    network = Draft(replace(SHAPE, window=window), target.config)
    batch, _ = pack(make_answers(6), torch.arange(6).numpy(), 1, 160)
    first = int((batch.document == 1).nonzero()[0, 1])
    anchor = torch.tensor([[first + 11]])
    context = step.features(target, batch, [0, 1])
    before = step.draft_hidden(network, target, batch, anchor, context)
    for back in range(1, 12):
        changed = context.clone()
        changed[0, first + 11 - back] += 1
        after = step.draft_hidden(network, target, batch, anchor, changed)
        assert torch.equal(before, after) is (back > window)
    whole = Draft(SHAPE, target.config)
    whole.load_state_dict(network.state_dict())
    assert torch.equal(before, step.draft_hidden(whole, target, batch, anchor, context)) is (window >= 11)


@pytest.mark.parametrize(("leak", "noticed"), [("future", "future"), ("block", "block"), ("document", "document")])
def test_a_planted_leak_is_noticed(
    target: Target, make_answers: Make, monkeypatch: pytest.MonkeyPatch, leak: str, noticed: str
) -> None:
    def leaky(anchors: Any, starts: Any, width: int, block: int, causal: bool) -> Any:
        sealed = attention.draft_mask(anchors, starts, width, block, causal).mask_mod

        def mask(b: Any, h: Any, q: Any, k: Any) -> Any:
            mine = q // block
            hole = {
                "future": (k > anchors[b, mine]) & (k <= anchors[b, mine] + 2),
                "block": k >= width,
                "document": k < starts[b, mine],
            }
            return sealed(b, h, q, k) | hole[leak]

        b, a = anchors.shape
        return attention.create_block_mask(mask, b, None, a * block, width + a * block, device="cpu")

    monkeypatch.setattr(step, "draft_mask", leaky)
    assert reaches(target, make_answers, True)[noticed]


def test_the_fused_loss_is_cross_entropy() -> None:
    hidden = torch.randn(50, 16, requires_grad=True)
    head, gold, weight = torch.randn(61, 16), torch.randint(61, (50,)), torch.rand(50)
    (frozen_head_loss(hidden, head, gold) * weight).sum().backward()
    ours, hidden.grad = hidden.grad, None
    expected = F.cross_entropy(hidden @ head.T, gold, reduction="none")
    (expected * weight).sum().backward()
    assert torch.allclose(frozen_head_loss(hidden, head, gold), expected, atol=1e-5)
    assert ours is not None and hidden.grad is not None and torch.allclose(ours, hidden.grad, atol=1e-5)


@pytest.mark.parametrize(("share", "variation"), [(1.0, 0.0), (0.3, 0.0), (0.0, 1.0), (0.6, 0.7)])
@pytest.mark.parametrize("rows", [8, 8192])
def test_the_fused_loss_at_soft_labels_is_what_autograd_makes_of_it(
    monkeypatch: pytest.MonkeyPatch, share: float, variation: float, rows: int
) -> None:
    monkeypatch.setattr(losses_of, "ROWS", rows)
    hidden = torch.randn(50, 16, requires_grad=True)
    head, gold, weight, states = torch.randn(61, 16), torch.randint(61, (50,)), torch.rand(50), torch.randn(50, 16)
    fused = frozen_head_loss(hidden, head, gold, Soft(states, share, variation))
    (fused * weight).sum().backward()
    ours, hidden.grad = hidden.grad, None
    p = (states @ head.T).softmax(-1)
    label = share * p + (1 - share) * F.one_hot(gold, 61)
    expected = F.cross_entropy(hidden @ head.T, label, reduction="none")
    expected = expected + variation * ((hidden @ head.T).softmax(-1) - p).abs().sum(-1) / 2
    (expected * weight).sum().backward()
    assert torch.allclose(fused, expected, atol=1e-5)
    assert ours is not None and hidden.grad is not None and torch.allclose(ours, hidden.grad, atol=1e-5)


def test_a_soft_label_is_what_the_target_says_there(target: Target, make_answers: Make) -> None:
    """In packed rows, at their ends too: the distribution of a forward pass over the document alone."""
    batch, _ = pack(make_answers(9), torch.arange(9).numpy(), 2, 100)
    context, states = step.features_and_states(target, batch, [0, 1])
    assert torch.equal(context, step.features(target, batch, [0, 1]))
    blocks = step.blocks_at(batch, step.random_anchors(batch, 30), SHAPE.block)
    soft = step.soft_labels(blocks, states, step.Objective(soft=1.0))
    assert soft is not None and blocks.valid.any() and not blocks.valid.all()
    said = soft.states.view(*blocks.gold.shape, -1)
    for b, a, k in blocks.valid.nonzero()[::7].tolist():
        here = int(blocks.anchors[b, a]) + k
        text = batch.tokens[b, int(batch.starts[b, here]) : here + 1]
        alone = Batch(text[None], torch.zeros_like(text)[None], text[None] > -1, text[None] * 0)
        expected = step.features_and_states(target, alone, [0])[1][0, -1]
        assert torch.allclose(said[b, a, k], expected, atol=1e-5)
        assert batch.tokens[b, here + 1] == blocks.gold[b, a, k]  # and the label is of this token


def test_what_soft_labels_cannot_be_had_with_is_refused(target: Target, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"soft 1\.5 is a share from 0 to 1"):
        step.Objective(soft=1.5)
    with pytest.raises(ValueError, match="'dpace' go by"):
        step.Objective("dpace", variation=1.0)
    with pytest.raises(ValueError, match="'free' learns from"):
        Training(target, replace(SHAPE, selector="free"), Recipe(objective=step.Objective(soft=0.5)), tmp_path)


def test_positions_are_drawn_in_proportion_to_their_weight() -> None:
    weights = static_weights(15, 16, torch.device("cpu")).repeat(40) * (torch.rand(600) > 0.3)
    torch.manual_seed(0)
    counts = torch.zeros(600)
    for _ in range(2000):
        counts += torch.bincount(draw(weights, 200), minlength=600)
    expected = weights / weights.sum() * 200 * 2000
    assert (counts - expected).abs().max() < 0.15 * expected.max()
    assert counts[weights == 0].sum() == 0


def test_dynamic_weights_are_the_gradient_of_log_expected_length() -> None:
    logp = (-3 * torch.rand(20, 7, dtype=torch.float64)).requires_grad_()
    lens = torch.randint(1, 8, (20,))
    valid = torch.arange(7) < lens[:, None]
    length = (logp.cumsum(-1).exp() * valid).sum(-1)
    length.log().sum().backward()
    assert logp.grad is not None
    assert torch.allclose(dpace_weights(logp.detach(), valid), logp.grad, atol=1e-9)


def test_muon_moves_as_torch_s() -> None:
    layers = [torch.nn.Linear(24, 40, bias=False) for _ in range(4)]
    before = layers[0].weight.detach().clone()
    layers[1].load_state_dict(layers[0].state_dict())
    theirs = torch.optim.Muon(layers[0].parameters(), lr=1e-2, weight_decay=0.01, adjust_lr_fn="match_rms_adamw")
    ours = Muon([layers[2].weight, layers[1].weight, layers[3].weight], lr=1e-2)
    x = torch.randn(200, 24)
    for _ in range(5):
        noise = torch.randn(200, 40)
        for layer in layers:
            layer.zero_grad()
            (layer(x).tanh() - noise).square().sum().backward()
        theirs.step()
        ours.step()
    moved = (layers[0].weight - before).abs().max()
    assert (layers[1].weight - layers[0].weight).abs().max() < 0.05 * moved


@pytest.mark.parametrize(
    ("selector", "objective", "optimizer", "causal"),
    [
        ("tied", step.Objective(), "muon", True),
        ("none", step.Objective(), "adamw", False),
        ("free", step.Objective("dpace"), "muon", True),
        ("tied", step.Objective(variation=1.0), "muon", True),
        ("none", step.Objective(soft=0.1), "muon", True),
    ],
)
def test_loss_goes_down(
    target: Target,
    make_answers: Make,
    tmp_path: Path,
    selector: str,
    objective: step.Objective,
    optimizer: str,
    causal: bool,
) -> None:
    shape = DraftShape(**{**vars(SHAPE), "selector": selector, "causal": causal})
    recipe = Recipe(
        steps=60, rows=2, width=128, anchors=16, warmup=5, optimizer=optimizer, lr=5e-3, objective=objective
    )  # fmt: skip
    training = Training(target, shape, recipe, tmp_path)
    source = batches(make_answers(40), 2, 128, 0, Cursor())
    losses = [training.advance(batch).item() for batch, _ in islice(source, 60)]
    assert sum(losses[-5:]) < 0.8 * sum(losses[:5])


def test_training_learns_resumes_and_saves(target: Target, make_answers: Make, tmp_path: Path) -> None:
    recipe = Recipe(steps=200, rows=2, width=128, anchors=16, warmup=10, lr=1e-2, average=0.9, evaluate_documents=2)
    training = Training(target, SHAPE, recipe, tmp_path)
    result = train(training, make_answers(60), make_answers(4, seed=9))
    assert result["even"]["chain"] > 3 and result["even"]["served_tree31"] > 3  # of 6: it counts upwards too
    assert training.step == 200 and (tmp_path / "curve.png").stat().st_size > 0

    saved = draft.load(tmp_path / "draft", target.config)
    assert saved.shape == SHAPE
    for name, tensor in saved.state_dict().items():
        assert torch.equal(tensor, training.average[name].bfloat16().float())

    resumed = Training(target, SHAPE, recipe, tmp_path)
    resumed.resume()
    assert resumed.step == 200 and resumed.cursor == training.cursor
    batch = next(batches(make_answers(10, seed=5), 2, 128, 0, Cursor()))[0]
    losses = []
    for run in (training, resumed):
        torch.manual_seed(1)
        losses.append([run.advance(batch).item() for _ in range(3)])
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)


def test_training_begins_with_a_saved_draft_causal_or_not(target: Target, tmp_path: Path) -> None:
    saved = Draft(SHAPE, target.config)
    draft.save(saved, saved.state_dict(), tmp_path / "draft", torch.float32)
    training = Training(target, replace(SHAPE, causal=not SHAPE.causal, window=9), Recipe(steps=1), tmp_path)
    training.begin_with(tmp_path / "draft")
    for name, tensor in saved.state_dict().items():
        assert torch.equal(training.draft.state_dict()[name], tensor) and torch.equal(training.average[name], tensor)
    draft.save(training.draft, training.average, tmp_path / "windowed", torch.float32)
    assert draft.load(tmp_path / "windowed", target.config).shape == training.draft.shape
    other = Training(target, replace(SHAPE, layers=1), Recipe(steps=1), tmp_path)
    with pytest.raises(ValueError, match=r"layers=2.*not DraftShape\(layers=1"):
        other.begin_with(tmp_path / "draft")
