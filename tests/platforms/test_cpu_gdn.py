"""Gated delta nets over prompts, tokens and trees, beside transformers' own recurrence over each path alone."""

from __future__ import annotations

import pkgutil
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F
from transformers.models.qwen3_next.modeling_qwen3_next import torch_recurrent_gated_delta_rule

from sglang_dflash.platforms.cpu import gdn

K_HEADS, V_HEADS, KEY, VALUE, KERNEL = 2, 4, 16, 8, 4
CHANNELS = 2 * K_HEADS * KEY + V_HEADS * VALUE
SLOTS = 9
# Two trees of 7 drafted nodes: a branching one, with siblings all over, and a chain.
PARENTS = torch.tensor([[0, 0, 0, 1, 1, 2, 3, 3], [0, 0, 1, 2, 3, 4, 5, 6]])
EXACT = {"rtol": 0, "atol": 1e-4}


@pytest.fixture
def layer() -> SimpleNamespace:
    torch.manual_seed(0)
    return SimpleNamespace(
        layer_id=0, conv_weights=torch.randn(CHANNELS, KERNEL) / 2, bias=None, q_dim=K_HEADS * KEY,
        k_dim=K_HEADS * KEY, v_dim=V_HEADS * VALUE, num_q_heads=K_HEADS, num_k_heads=K_HEADS, num_v_heads=V_HEADS,
        head_k_dim=KEY, A_log=torch.randn(V_HEADS) - 3, dt_bias=torch.randn(V_HEADS),
    )  # fmt: skip


Tokens = tuple[Tensor, Tensor, Tensor]  # a layer's inputs [tokens, CHANNELS], a and b [tokens, V_HEADS]


def some_tokens(count: int) -> Tokens:
    return torch.randn(count, CHANNELS), torch.randn(count, V_HEADS), torch.randn(count, V_HEADS)


def joined(*parts: Tokens) -> Tokens:
    return tuple(torch.cat(x) for x in zip(*parts, strict=True))  # type: ignore[return-value]


def picked(tokens: Tokens, rows: Any) -> Tokens:
    return tuple(x[rows] for x in tokens)  # type: ignore[return-value]


def by_transformers(layer: Any, tokens: Tokens) -> tuple[Tensor, Tensor, Tensor]:
    """Answers [tokens, heads, value], the last inputs and the state behind all tokens, from the very beginning."""
    x, a, b = (t[None] for t in tokens)
    padded = F.pad(x.transpose(1, 2), (KERNEL - 1, 0))
    mixed = F.silu(F.conv1d(padded, layer.conv_weights[:, None], groups=CHANNELS)).transpose(1, 2)
    q, k, v = mixed.split([layer.q_dim, layer.k_dim, layer.v_dim], -1)
    q, k = (y.unflatten(-1, (K_HEADS, KEY)).repeat_interleave(V_HEADS // K_HEADS, 2) for y in (q, k))
    decay = -layer.A_log.exp() * F.softplus(a + layer.dt_bias)
    answers, state = torch_recurrent_gated_delta_rule(
        q, k, v.unflatten(-1, (V_HEADS, VALUE)), decay, b.sigmoid(), output_final_state=True,
        use_qk_l2norm_in_kernel=True,
    )  # fmt: skip
    return answers[0], padded[0, :, -(KERNEL - 1) :], state[0].transpose(-1, -2)


class Server:
    """The backend with one layer's pools and none of SGLang around it."""

    def __init__(self, layer: Any) -> None:
        self.layer = layer
        self.kept, self.states = torch.zeros(SLOTS, CHANNELS, KERNEL - 1), torch.zeros(SLOTS, V_HEADS, VALUE, KEY)
        self.backend = gdn.GatedDeltaNets.__new__(gdn.GatedDeltaNets)
        self.backend._kernel, self.backend._read = KERNEL, {}
        cache = SimpleNamespace(conv=[self.kept], temporal=self.states)
        self.backend.req_to_token_pool = SimpleNamespace(mamba2_layer_cache=lambda layer_id: cache)

    def _batch(self, slots: list[int], verify: bool = False, **metadata: Any) -> Any:
        self.backend.forward_metadata = SimpleNamespace(
            mamba_cache_indices=torch.tensor(slots, dtype=torch.int32), has_mamba_track_mask=False, **metadata
        )
        return SimpleNamespace(
            forward_mode=SimpleNamespace(is_target_verify=lambda: verify), mamba_track_mask=None
        )

    def prefill(self, slots: list[int], prompts: list[Tokens]) -> list[Tensor]:
        lens = [len(prompt[0]) for prompt in prompts]
        starts = torch.tensor([0, *lens]).cumsum(0)
        batch = self._batch(slots, query_start_loc=starts)
        return list(self.backend.forward_extend(self.layer, batch, *joined(*prompts))[0].split(lens))

    def decode(self, slots: list[int], tokens: Tokens) -> Tensor:
        return self.backend.forward_decode(self.layer, self._batch(slots), *tokens)[0]

    def verify(self, slots: list[int], trees: Tokens, parents: Tensor) -> Tensor:
        """trees: all nodes of a request's tree, then of the next one's. Answers [bs, w, heads, value]."""
        batch = self._batch(slots, verify=True)
        self.backend._windows = gdn.Paths.of(seen_by(parents), KERNEL)
        return self.backend.forward_extend(self.layer, batch, *trees)[0].unflatten(0, parents.shape)


def path(parents: Tensor, node: int) -> list[int]:
    return [*path(parents, int(parents[node])), node] if node else [0]


def seen_by(parents: Tensor) -> Tensor:
    seen = torch.zeros(*parents.shape, parents.shape[1], dtype=torch.bool)
    for b, w in torch.cartesian_prod(*map(torch.arange, parents.shape)).tolist():
        seen[b, w, path(parents[b], w)] = True
    return seen


@pytest.fixture
def verified(layer: Any) -> SimpleNamespace:
    """Two requests, prefilled behind 70 and 2 tokens, and a tree of each verified."""
    server, slots = Server(layer), [5, 2]
    prompts, trees = [some_tokens(70), some_tokens(2)], some_tokens(PARENTS.numel())
    server.prefill(slots, prompts)
    before = server.kept.clone(), server.states.clone()
    answers = server.verify(slots, trees, PARENTS)
    assert torch.equal(server.kept, before[0]) and torch.equal(server.states, before[1])
    return SimpleNamespace(server=server, slots=slots, prompts=prompts, trees=trees, answers=answers)


def tokens_to(verified: Any, b: int, node: int) -> Tokens:
    """A request's prompt and the path to one node of its tree."""
    rows = [b * PARENTS.shape[1] + i for i in path(PARENTS[b], node)]
    return joined(verified.prompts[b], picked(verified.trees, rows))


@pytest.mark.parametrize("lens", [[1, 3, 64], [65, 200, 2]])
def test_prompts_and_the_tokens_after_them(layer: Any, lens: list[int]) -> None:
    server, slots, prompts = Server(layer), [1, 4, 7], [some_tokens(n) for n in lens]
    got, next_tokens = server.prefill(slots, prompts), some_tokens(len(lens))
    then = server.decode(slots, next_tokens)
    for i, (slot, prompt) in enumerate(zip(slots, prompts, strict=True)):
        answers, kept, state = by_transformers(layer, joined(prompt, picked(next_tokens, [i])))
        torch.testing.assert_close(torch.cat([got[i], then[i : i + 1]]), answers, **EXACT)
        torch.testing.assert_close(server.kept[slot], kept, **EXACT)
        torch.testing.assert_close(server.states[slot], state, **EXACT)


def test_a_prompt_in_pieces_is_the_prompt(layer: Any) -> None:
    prompt, server = some_tokens(150), Server(layer)
    answers = torch.cat([server.prefill([3], [picked(prompt, slice(*cut))])[0] for cut in ((0, 80), (80, 150))])
    torch.testing.assert_close(answers, by_transformers(layer, prompt)[0], **EXACT)


def test_each_node_of_a_tree_is_read_behind_its_own_path(verified: Any, layer: Any) -> None:
    for b, node in torch.cartesian_prod(*map(torch.arange, PARENTS.shape)).tolist():
        alone = by_transformers(layer, tokens_to(verified, b, node))[0][-1]
        torch.testing.assert_close(verified.answers[b, node], alone, **EXACT)


def test_a_swapped_sibling_is_found(verified: Any, layer: Any) -> None:
    """Nodes 3 and 5 have other parents: what is said behind them is not what is said behind each other's."""
    wrong = PARENTS.clone()
    wrong[0, [3, 5]] = PARENTS[0, [5, 3]]
    answers = verified.server.verify(verified.slots, verified.trees, wrong)
    gap = (answers - verified.answers)[0].abs().amax((-1, -2))
    assert (gap > 1e-2).tolist() == [i in (3, 5, 6, 7) for i in range(8)]


@pytest.mark.parametrize("accepted", [[7, 3], [4, 0], [2, 7]])
def test_what_is_committed_is_what_decoding_the_same_tokens_leaves(
    verified: Any, layer: Any, accepted: list[int]
) -> None:
    verified.server.backend.commit(torch.tensor(accepted), None, None)
    plain, bonus = Server(layer), some_tokens(2)
    plain.prefill(verified.slots, verified.prompts)
    for b, (slot, node) in enumerate(zip(verified.slots, accepted, strict=True)):
        for row in path(PARENTS[b], node):
            plain.decode([slot], picked(verified.trees, [b * PARENTS.shape[1] + row]))
    assert_same(verified.server, plain)
    torch.testing.assert_close(
        verified.server.decode(verified.slots, bonus), plain.decode(verified.slots, bonus), **EXACT
    )


def test_a_skipped_commit_is_found(verified: Any, layer: Any) -> None:
    plain = Server(layer)
    plain.prefill(verified.slots, verified.prompts)
    plain.decode(verified.slots, picked(verified.trees, [0, PARENTS.shape[1]]))
    with pytest.raises(AssertionError):
        assert_same(verified.server, plain)


def assert_same(one: Server, other: Server) -> None:
    torch.testing.assert_close(one.kept, other.kept, **EXACT)
    torch.testing.assert_close(one.states, other.states, **EXACT)


def test_the_prefix_cache_keeps_the_state_at_a_node_on_the_way(verified: Any, layer: Any) -> None:
    """Of the first request, in slot 8; the second crosses no boundary, and a request that is gone has no slot."""
    for tracked, nodes, kept in (([8, 3], [3, -1], True), ([-1, 3], [3, -1], False)):
        verified.server.kept[[3, 8]], verified.server.states[[3, 8]] = 0, 0
        verified.server.verify(verified.slots, verified.trees, PARENTS)
        before = verified.server.kept.clone(), verified.server.states.clone()
        verified.server.backend.commit(torch.tensor([7, 6]), torch.tensor(tracked), torch.tensor(nodes))
        assert not verified.server.states[3].any() and verified.server.states[8].any() == kept
        if kept:
            _, inputs, state = by_transformers(layer, tokens_to(verified, 0, 3))
            torch.testing.assert_close(verified.server.kept[8], inputs, **EXACT)
            torch.testing.assert_close(verified.server.states[8], state, **EXACT)
        verified.server.kept[:], verified.server.states[:] = before


def test_projections_are_split_as_each_model_lays_them_out() -> None:
    """Whatever lies where, head h's parts come out as head h's."""
    group, tokens = V_HEADS // K_HEADS, 3
    q, k = torch.randn(2, tokens, K_HEADS, KEY)
    v, z = torch.randn(2, tokens, K_HEADS, group, VALUE)
    b, a = torch.randn(2, tokens, K_HEADS, group)
    by_kind = torch.cat([x.flatten(1) for x in (q, k, v, z)], 1), torch.cat([b.flatten(1), a.flatten(1)], 1)
    by_head = (
        torch.cat([q, k, v.flatten(2), z.flatten(2)], 2).flatten(1), torch.cat([b, a], 2).flatten(1),
    )  # fmt: skip
    sizes = K_HEADS, V_HEADS, KEY, VALUE
    for split, projected in ((gdn.split_by_kind, by_kind), (gdn.split_by_head, by_head)):
        got = split(*projected, *sizes)
        wanted = by_kind[0][:, :CHANNELS], z.flatten(1, 2), b.flatten(1), a.flatten(1)
        for given, want in zip(got, wanted, strict=True):
            assert torch.equal(given, want)


def test_what_is_replaced_is_there() -> None:
    for target, (hook, _) in gdn.HOOKS.items():
        original = pkgutil.resolve_name(target)
        assert isinstance(original, type) == isinstance(hook, type), target


def test_shared_experts_and_attention_are_gated_by_sigmoids() -> None:
    hidden, weight, shared, experts = torch.randn(3, 8), torch.randn(8), torch.randn(3, 8), torch.randn(3, 8)
    want = experts + torch.sigmoid((hidden * weight).sum(-1, keepdim=True)) * shared
    gdn.add_shared_expert(hidden, weight, shared, experts)
    torch.testing.assert_close(experts, want)
    by_head = hidden.view(3, 2, 4)
    torch.testing.assert_close(gdn.gate(shared, by_head, inplace=True), shared * torch.sigmoid(hidden))


def test_answers_are_normed_then_gated() -> None:
    x, z, norm = torch.randn(5, VALUE), torch.randn(5, VALUE), SimpleNamespace(weight=torch.randn(VALUE), eps=1e-6)
    normal = x / (x.square().mean(-1, keepdim=True) + 1e-6).sqrt() * norm.weight
    for activation, gate in (("swish", F.silu), ("silu", F.silu), ("sigmoid", torch.sigmoid)):
        norm.activation = activation
        torch.testing.assert_close(gdn.gated_norm(lambda: x, norm, x, z), normal * gate(z))
