"""What a captured draft pass leaves behind, without a GPU: graph memory is played by tensors that are overwritten. And
what a draft knows of the noise: one that says what the target says drafts just what the target is going to sample.
"""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from sglang_dflash.budget import Shape
from sglang_dflash.draft.lattice import Candidates
from sglang_dflash.kernels import Leads
from sglang_dflash.step import ranks
from sglang_dflash.step.draft_pass import DraftRunner, KnownNoise
from sglang_dflash.step.penalties import Penalties
from sglang_dflash.step.sampling import sample_nodes
from sglang_dflash.tree import DraftTree, grow, grow_chain, walk

BS, DEPTH, VOCAB, ANY_K = 4, 6, 248, 1 << 30


def a_runner(selector: Any = None) -> Any:
    """A draft whose hidden states are the logits themselves."""
    runner: Any = object.__new__(DraftRunner)
    plain = SimpleNamespace(output_multiplier=1.0, softcap=None)
    shape = Shape(DEPTH, DEPTH, DEPTH + 1, 99)
    runner.options = SimpleNamespace(grown=lambda block: shape, top_k=16, draft=plain)
    runner.selector, runner._grow, runner._head = selector, grow, lambda penalised, bs, hidden: hidden
    runner._noise, runner._captured = KnownNoise(BS + 3, "cpu"), {}
    runner._penalties = Penalties(BS, VOCAB, "cpu")
    return runner


def captured(runner: Any, passes: list[Tensor]) -> None:
    """The hook's calls: by the two passes that warm up, and those in graphs; other graphs of the same pool follow."""
    made = []
    for name in ("_candidates", "_tree"):
        how = getattr(runner, name)
        setattr(runner, name, lambda *args, how=how: made.append(how(*args)) or made[-1])
    told, of = [], runner._penalties.at
    runner._penalties.at = lambda *where: told.append(where) or of(*where)
    for hidden in passes:
        input_ids, requests = torch.zeros(len(hidden), dtype=torch.int64), torch.zeros(BS, dtype=torch.int64)
        batch = SimpleNamespace(batch_size=BS, input_ids=input_ids, req_pool_indices=requests, positions=input_ids)
        runner._capture_tree(None, SimpleNamespace(hidden_states=hidden), batch, len(hidden))
        assert told[-1][0] is requests and told[-1][1] is input_ids  # where a replay's batch is written
    for memory in made[2:]:
        for x in memory._tensors():
            x.zero_()
    del runner._candidates, runner._tree


def logits_of(scale: float = 2.0) -> Tensor:
    return torch.randn(BS * (DEPTH + 1), VOCAB) * scale


def draws(runner: Any, hidden: Tensor, bs: int, nodes: int, leads: Leads | None, graph: bool) -> DraftTree:
    """What `draft` makes of a pass of the first bs requests, replayed or not."""
    output = SimpleNamespace(can_run_graph=graph, logits_output=SimpleNamespace(hidden_states=hidden))
    runner.runner = SimpleNamespace(forward=lambda _: output, decode_cuda_graph_runner=SimpleNamespace(bs=BS))
    runner._forward_batch = lambda *_: None
    window = SimpleNamespace(block_tokens=torch.zeros(bs, DEPTH + 1).long(), prefix_lens=torch.arange(bs))
    info = SimpleNamespace(is_all_greedy=True)
    shape = Shape(nodes, DEPTH, DEPTH + 1, 99)
    return runner.draft(SimpleNamespace(sampling_info=info), window, shape, False, lambda: leads)


class Selector:
    """A selector of rank 4, of random codebooks."""

    def __init__(self) -> None:
        self.predecessor_codebook, self.successor_codebook = torch.randn(2, VOCAB, 4)
        self.hidden_projection = torch.nn.Linear(VOCAB, 4, bias=False).requires_grad_(False)


@pytest.mark.usefixtures("either_ops")
@pytest.mark.parametrize("known", [None, [5, 6, 7]])
@pytest.mark.parametrize("bs", [BS, 2])
@pytest.mark.parametrize("selects", [False, True])
def test_what_a_graph_leaves_is_drafted_as_without_one(known: list[int] | None, bs: int, selects: bool) -> None:
    torch.manual_seed(0)
    runner, passes = a_runner(Selector() if selects else None), [logits_of() for _ in range(4)]
    captured(runner, passes)
    leads = None
    if known is not None:
        tokens = torch.tensor([known] + [[-1] * 3] * (bs - 1))
        leads = Leads(tokens, torch.tensor([[-1, 0, 1]] * bs), torch.tensor([1] + [0] * (bs - 1)))
    for nodes in (DEPTH, 3):
        replayed = draws(runner, torch.full((BS, VOCAB), torch.nan), bs, nodes, leads, graph=True)
        eager = draws(runner, passes[-1][: bs * (DEPTH + 1)], bs, nodes, leads, graph=False)
        assert replayed.max_depth == eager.max_depth
        for x, y in zip(replayed._tensors(), eager._tensors(), strict=True):
            torch.testing.assert_close(x, y)
        if known is not None:
            assert known[0] == replayed.tokens[0, 1]


def asked(**changed: Any) -> SimpleNamespace:
    """The settings of requests at four temperatures, of which one is greedy."""
    settings = {
        "sampling_seed": torch.tensor([11, -12, 13, 14]),
        "temperatures": torch.tensor([[1.0], [0.6], [1.0], [1.4]]),
        "top_ks": torch.tensor([ANY_K, ANY_K, 1, ANY_K], dtype=torch.int32),
        "top_ps": torch.ones(BS),
        "min_ps": torch.zeros(BS),
        "is_all_greedy": False,
        "need_top_k_sampling": True,
        "need_top_p_sampling": False,
        "need_min_p_sampling": False,
    }
    return SimpleNamespace(**{**settings, **changed})


def walked(drafted: DraftTree, info: Any, target: Tensor, prefix_lens: Tensor) -> Tensor:
    """Tokens that each request emits in a step, [bs]; target [bs, DEPTH + 1, VOCAB]: its logits by depth alone."""
    logits = target.gather(1, drafted.depths[..., None].expand(-1, -1, VOCAB)).flatten(0, 1)
    positions = (prefix_lens[:, None] + drafted.depths).flatten()
    return walk(drafted, sample_nodes(logits, info, positions, drafted)).lens


def emitted(known: KnownNoise, info: Any, target: Tensor, prefix_lens: Tensor, grow_: Any, nodes: int) -> Tensor:
    """The same where the draft says what the target says."""
    bonus = torch.zeros(BS, dtype=torch.int64)
    lattice = Candidates.of(target[:, :DEPTH], lambda hidden: hidden, None, 16, known.of(BS)).lattice(bonus, None)
    return walked(grow_(lattice, bonus, nodes), info, target, prefix_lens)


@pytest.mark.usefixtures("either_ops")
def test_a_draft_that_is_right_drafts_what_the_target_samples() -> None:
    torch.manual_seed(0)
    known = KnownNoise(BS + 3, "cpu")
    for _ in range(3):
        target, prefix_lens = torch.randn(BS, DEPTH + 1, VOCAB) * 2, torch.randint(2000, (BS,))
        known.tell(asked(), prefix_lens)
        assert emitted(known, asked(), target, prefix_lens, grow_chain, DEPTH).tolist() == [DEPTH + 1] * BS
        assert emitted(known, asked(), target, prefix_lens, grow, 3).min() >= 2


@pytest.mark.parametrize("bug", ["none", "noise of the next position", "a neighbour's seed", "no noise"])
def test_other_noise_than_the_target_s_would_be_seen(bug: str) -> None:
    torch.manual_seed(0)
    known, prefix_lens = KnownNoise(BS, "cpu"), torch.tensor([3, 40, 500, 6000])
    known.tell(asked(), prefix_lens)
    if bug == "noise of the next position":
        known._noise.positions.add_(1)
    elif bug == "a neighbour's seed":
        known._noise.seeds.copy_(known._noise.seeds.roll(1))
    elif bug == "no noise":
        known.tell(asked(is_all_greedy=True), prefix_lens)
    lens = emitted(known, asked(), torch.randn(BS, DEPTH + 1, VOCAB) * 2, prefix_lens, grow_chain, DEPTH)
    assert lens[2] == DEPTH + 1  # the greedy one's
    assert ((lens == DEPTH + 1) if bug == "none" else (lens <= 2))[[0, 1, 3]].all()


def test_noise_is_told_where_captured_passes_look_and_taken_back() -> None:
    known = KnownNoise(BS + 2, "cpu")
    assert known.of(BS) is None
    captured = known._first(BS + 2)
    known.tell(asked(), torch.arange(BS))
    torch.testing.assert_close(captured.weights, torch.tensor([1.0, 0.6, 0.0, 1.4, 0.0, 0.0]))
    assert (captured.seeds[:BS].tolist(), captured.positions[:BS].tolist()) == ([11, -12, 13, 14], [0, 1, 2, 3])
    known.tell(asked(is_all_greedy=True), torch.arange(BS))
    assert not captured.weights.any() and known.of(BS) is None


def test_a_penalised_request_s_lattice_is_penalised_and_no_other() -> None:
    """Two requests whose draft likes token 4 best, then 6; the second has said 4 before, and pays for it."""
    vocab, block, bs = 9, 3, 2
    runner = object.__new__(DraftRunner)
    shape = Shape(2, 2, block, 99)
    draft = SimpleNamespace(output_multiplier=1.0, softcap=None, vocab_size=vocab - 1)
    runner.options = SimpleNamespace(grown=lambda width: shape, top_k=2, draft=draft)  # type: ignore[assignment]
    runner.selector, runner._lm_head, runner._grow = None, None, grow
    runner._noise = KnownNoise(bs, "cpu")
    runner._logits = lambda hidden, head: hidden.clone()
    hidden = torch.zeros(bs * block, vocab)
    hidden[:, 4], hidden[:, 6] = 3.0, 2.0

    def request(number: int, penalty: float) -> Any:
        params = SimpleNamespace(
            frequency_penalty=penalty, presence_penalty=0.0, repetition_penalty=1.0, min_new_tokens=0
        )
        return SimpleNamespace(
            origin_input_ids=[1], output_ids=[4, 4], sampling_params=params, kv=SimpleNamespace(req_pool_idx=number)
        )

    reqs, numbers, lengths = [request(0, 0.0), request(1, 1.0)], torch.arange(bs), torch.tensor([3, 3])
    penalties = Penalties(bs, vocab, "cpu")
    penalties.prefill(SimpleNamespace(reqs=reqs, decoding_reqs=None, req_pool_indices=numbers, seq_lens=lengths))
    penalised = penalties.at(numbers, (lengths[:, None] + torch.arange(block) - 1).flatten())
    roots = torch.tensor([[4, 5, 5]] * bs)
    for paid, want in ((penalised, [4, 6, 6]), (None, [4, 4, 4])):
        tree = runner._tree(runner._candidates(hidden, bs, block, paid), roots, 2)
        assert tree.tokens.tolist() == [[4, 4, 4], want]


@pytest.mark.parametrize("any_penalised", [False, True])
def test_a_graph_is_replayed_with_penalties_too(any_penalised: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    runner: Any = object.__new__(DraftRunner)
    output = SimpleNamespace(can_run_graph=True, logits_output=None)
    runner.runner = SimpleNamespace(forward=lambda _: output, decode_cuda_graph_runner=SimpleNamespace(bs=2))
    runner._captured = {(1, 2): (None, DraftTree.root(torch.tensor([10, 11])))}
    runner._noise = KnownNoise(BS, "cpu")
    monkeypatch.setattr(DraftRunner, "_forward_batch", lambda *_: None)
    monkeypatch.setattr(ranks, "first_ranks_tree", lambda grown: grown)
    window = SimpleNamespace(block_tokens=torch.zeros(1, 1).long(), prefix_lens=torch.tensor([3]))
    batch = SimpleNamespace(sampling_info=asked(is_all_greedy=True))
    shape = Shape(1, 1, 1, 99)
    monkeypatch.setattr(DraftTree, "smaller", lambda self, nodes: self)
    assert runner.draft(batch, window, shape, any_penalised, lambda: None).tokens.tolist() == [[10]]


def test_a_draft_pass_looks_at_the_noise_of_its_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    shape, runner = Shape(DEPTH, DEPTH, DEPTH + 1, 99), a_runner()
    runner._grow = grow_chain
    monkeypatch.setattr(DraftRunner, "_forward_batch", lambda *_: None)
    for info in (asked(), asked(top_ks=torch.ones(BS, dtype=torch.int32), is_all_greedy=True), asked()):
        target, prefix_lens = torch.randn(BS, DEPTH + 1, VOCAB) * 2, torch.randint(2000, (BS,))
        hidden = torch.cat([target[:, -1:], target[:, :-1]], 1).flatten(0, 1)  # at the bonus token: not looked at
        output = SimpleNamespace(can_run_graph=False, logits_output=SimpleNamespace(hidden_states=hidden))
        runner.runner = SimpleNamespace(forward=lambda _, output=output: output)
        window = SimpleNamespace(block_tokens=torch.zeros(BS, DEPTH + 1).long(), prefix_lens=prefix_lens)
        tree = runner.draft(SimpleNamespace(sampling_info=info), window, shape, False, lambda: None)
        assert walked(tree, info, target, prefix_lens).tolist() == [DEPTH + 1] * BS


@pytest.mark.parametrize("nodes", [0, 7])
def test_graphs_of_roots_write_the_context_that_a_draft_will_read(nodes: int) -> None:
    """Of wider passes it is not known there what is kept; and a server that never drafts keeps none."""
    told: list[tuple[Tensor, ...]] = []
    runner: Any = object.__new__(DraftRunner)
    runner.options = SimpleNamespace(largest=SimpleNamespace(nodes=nodes))
    runner.network = SimpleNamespace(project_features=lambda x: x + 1, write_context=lambda *given: told.append(given))
    runner._pools = None
    for width in (1, 8):
        output = SimpleNamespace(hidden_states=torch.zeros(2 * width, 3))
        places = torch.arange(2 * width)
        batch = SimpleNamespace(batch_size=2, positions=places, out_cache_loc=places + 4)
        runner._capture_context(None, output, batch, 2 * width)
    assert len(told) == (1 if nodes else 0)
    if nodes:
        context, positions, slots, _ = told[0]
        assert (context.tolist(), positions.tolist(), slots.tolist()) == ([[1.0] * 3] * 2, [0, 1], [4, 5])
