"""The plain attention backend against attention written out one query at a time."""

from __future__ import annotations

import math
from types import SimpleNamespace

import pytest
import torch
from sglang.srt.layers.radix_attention import AttentionType, RadixAttention
from sglang.srt.mem_cache.memory_pool import KVWriteLoc
from sglang.srt.mem_cache.swa_memory_pool import SWAKVPool
from sglang.srt.model_executor.forward_batch_info import ForwardMode

from sglang_dflash.platforms import plain_attention
from sglang_dflash.platforms.cpu.memory import CpuKVPool
from sglang_dflash.platforms.plain_attention import PlainAttnBackend

HEADS, KV_HEADS, HEAD_DIM = 6, 2, 16
POOL = 1024


class World:
    """Requests with known keys and values, some of them already in the pool."""

    def __init__(self, prefix_lens: list[int], new_lens: list[int], page: int, **layer: object) -> None:
        torch.manual_seed(len(prefix_lens) * 7 + page)
        self.prefix_lens, self.new_lens = prefix_lens, new_lens
        self.bs = len(prefix_lens)
        self.lens = [p + n for p, n in zip(prefix_lens, new_lens, strict=True)]
        self.layer = RadixAttention(HEADS, HEAD_DIM, HEAD_DIM**-0.5, KV_HEADS, layer_id=0, **layer)
        self.pool = CpuKVPool(POOL, page, torch.float32, KV_HEADS, HEAD_DIM, 1, "cpu", enable_memory_saver=False)
        self.req_to_token = torch.randint(0, POOL, (self.bs + 3, max(self.lens) + 5), dtype=torch.int32)
        self.rows = torch.randperm(self.bs + 3)[: self.bs]
        self.keys = [torch.randn(n, KV_HEADS, HEAD_DIM) for n in self.lens]
        self.values = [torch.randn(n, KV_HEADS, HEAD_DIM) for n in self.lens]
        self.queries = [torch.randn(n, HEADS, HEAD_DIM) for n in new_lens]
        self.sinks: torch.Tensor | None = None
        self.positions = [torch.arange(p, n) for p, n in zip(prefix_lens, self.lens, strict=True)]
        # Slots in pages taken in a random order: never slot 0's page, which takes padding.
        pages = (torch.randperm(POOL // page - 1) + 1).tolist()
        self.slots = []
        for row, n in zip(self.rows.tolist(), self.lens, strict=True):
            own = [pages.pop() for _ in range(-(-n // page))]
            slots = (torch.tensor(own)[:, None] * page + torch.arange(page)).flatten()[:n]
            self.req_to_token[row, :n] = slots.to(torch.int32)
            self.slots.append(slots)
        for prefix, slots, k, v in zip(prefix_lens, self.slots, self.keys, self.values, strict=True):
            self.pool.set_kv_buffer(self.layer, slots[:prefix], k[:prefix], v[:prefix])

    def sink(self, *sinks: float) -> World:
        """Give each head the score of a key whose value is zero."""
        self.sinks = torch.tensor(sinks)
        return self

    def run(self, mode: ForwardMode, window_mask: torch.Tensor | None = None, reach: int = 0) -> torch.Tensor:
        """The backend's output [new tokens, heads, head_dim]; reach: of its window passes."""
        prefix_lens, new_lens = torch.tensor(self.prefix_lens), torch.tensor(self.new_lens)
        spec_info = None
        if mode.is_target_verify():
            spec_info = SimpleNamespace(draft_token_num=self.new_lens[0], window_mask=window_mask)
        batch = SimpleNamespace(
            forward_mode=mode,
            batch_size=self.bs,
            req_pool_indices=self.rows,
            seq_lens=prefix_lens if mode.is_target_verify() else prefix_lens + new_lens,
            extend_prefix_lens=prefix_lens,
            extend_seq_lens=new_lens,
            out_cache_loc=self._new(self.slots),
            positions=torch.cat(self.positions),
            spec_info=spec_info,
        )
        runner = SimpleNamespace(
            use_mla_backend=False,
            req_to_token_pool=SimpleNamespace(req_to_token=self.req_to_token),
            token_to_kv_pool=self.pool,
            kv_index_translator=None,
        )
        backend = PlainAttnBackend(runner)
        backend.reach = reach
        q, k, v = torch.cat(self.queries).flatten(1), self._new(self.keys), self._new(self.values)
        with torch.device("meta"):  # a tensor made where torch pleases, and not where the pool is, is of no use
            backend.init_forward_metadata(batch)
            asked = {} if self.sinks is None else {"sinks": self.sinks}
            return backend.forward(q, k, v, self.layer, batch, **asked).view(-1, HEADS, HEAD_DIM)

    def slide_apart(self) -> World:
        """Keep the layer's keys in a pool of their own, as a server does: of the prefix no more than a window.

        The first row, where all other slots lead, holds what no query may see.
        """
        window = self.layer.sliding_window_size
        pool = SWAKVPool(POOL, POOL // 2, 1, torch.float32, KV_HEADS, HEAD_DIM, [0], [1], "cpu",
                         token_to_kv_pool_class=CpuKVPool)  # fmt: skip
        rows = torch.zeros(POOL + 1, dtype=torch.int64)
        alive = torch.cat([s[max(0, p - window) :] for p, s in zip(self.prefix_lens, self.slots, strict=True)])
        rows[alive] = 1 + torch.randperm(POOL // 2)[: len(alive)]
        pool.register_mapping(rows)
        for prefix, slots, k, v in zip(self.prefix_lens, self.slots, self.keys, self.values, strict=True):
            where = KVWriteLoc(slots[:prefix], rows[slots[:prefix]])
            pool.set_kv_buffer(self.layer, where, k[:prefix], v[:prefix])
        for buffer in (pool.get_key_buffer(0), pool.get_value_buffer(0)):
            buffer[0] = 1e4
        self.pool = pool
        return self

    def _new(self, per_request: list[torch.Tensor]) -> torch.Tensor:
        return torch.cat([x[p:] for p, x in zip(self.prefix_lens, per_request, strict=True)])

    def reference(self, window_mask: torch.Tensor | None = None, reach: int = 10**9) -> torch.Tensor:
        """The same, one query and one head at a time, in float64."""
        out = []
        for b, prefix in enumerate(self.prefix_lens):
            key_pos = torch.cat([torch.arange(prefix), self.positions[b]])
            for i in range(self.new_lens[b]):
                seen = self._seen(b, i, window_mask) & self._within(key_pos, self.positions[b][i])
                seen[: max(0, prefix - reach)] = False
                out.append(torch.stack([self._head(b, i, h, seen) for h in range(HEADS)]))
        return torch.stack(out).float()

    def _seen(self, b: int, i: int, window_mask: torch.Tensor | None) -> torch.Tensor:
        n, prefix = self.new_lens[b], self.prefix_lens[b]
        window = torch.ones(n, dtype=torch.bool) if window_mask is None else window_mask[b, i].clone()
        if self.layer.attn_type == AttentionType.DECODER:
            window[i + 1 :] = False
        return torch.cat([torch.ones(prefix, dtype=torch.bool), window])

    def _within(self, key_pos: torch.Tensor, position: torch.Tensor) -> torch.Tensor:
        left = self.layer.sliding_window_size
        return (key_pos - position).abs() <= left if left >= 0 else torch.ones_like(key_pos, dtype=torch.bool)

    def _head(self, b: int, i: int, h: int, seen: torch.Tensor) -> torch.Tensor:
        group = h // (HEADS // KV_HEADS)
        scores = self.keys[b][seen, group].double() @ self.queries[b][i, h].double() / math.sqrt(HEAD_DIM)
        if self.layer.logit_cap > 0:
            scores = self.layer.logit_cap * torch.tanh(scores / self.layer.logit_cap)
        values = self.values[b][seen, group].double()
        if self.sinks is not None:
            scores = torch.cat([scores, self.sinks[h : h + 1].double()])
            values = torch.cat([values, values.new_zeros(1, HEAD_DIM)])
        return scores.softmax(0) @ values


def random_trees(bs: int, w: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Ancestor masks [bs, w, w] and depths [bs, w] of random trees, parents before their children."""
    mask, depth = torch.eye(w, dtype=torch.bool).repeat(bs, 1, 1), torch.zeros(bs, w, dtype=torch.int64)
    for b in range(bs):
        for i in range(1, w):
            parent = int(torch.randint(0, i, ()))
            mask[b, i] |= mask[b, parent]
            depth[b, i] = depth[b, parent] + 1
    return mask, depth


def assert_same(actual: torch.Tensor, expected: torch.Tensor) -> None:
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-5)


LAYERS = [
    pytest.param({}, id="full"),
    pytest.param({"sliding_window_size": 6}, id="sliding"),
    pytest.param({"logit_cap": 0.5}, id="capped"),
    pytest.param({"attn_type": AttentionType.ENCODER_ONLY}, id="bidirectional"),
    pytest.param({"attn_type": AttentionType.ENCODER_ONLY, "sliding_window_size": 6}, id="bidirectional-sliding"),
    pytest.param({"attn_type": AttentionType.ENCODER_ONLY, "sliding_window_size": 2}, id="narrower than its windows"),
]
pages = pytest.mark.parametrize("page", [1, 16])
layers = pytest.mark.parametrize("layer", LAYERS)
# Every request in one span, and a few requests a span.
spans = pytest.mark.parametrize("span_tokens", [8192, 60])


@pages
@layers
@pytest.mark.parametrize("prefix_lens", [[0, 0, 0], [17, 0, 40], [32]])
def test_extend(page: int, layer: dict, prefix_lens: list[int]) -> None:
    world = World(prefix_lens, [9, 23, 1][: len(prefix_lens)], page, **layer)
    assert_same(world.run(ForwardMode.EXTEND), world.reference())


@pages
@layers
@spans
@pytest.mark.parametrize("prefix_lens", [[25], [25, 25], [3, 50, 17, 0, 33]])
def test_decode(
    page: int, layer: dict, span_tokens: int, prefix_lens: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(plain_attention, "SPAN_TOKENS", span_tokens)
    world = World(prefix_lens, [1] * len(prefix_lens), page, **layer)
    assert_same(world.run(ForwardMode.DECODE), world.reference())


@pages
@layers
@spans
@pytest.mark.parametrize("w", [1, 7])
@pytest.mark.parametrize("prefix_lens", [[25], [3, 50, 17, 0, 33]])
def test_tree_window(
    page: int, layer: dict, span_tokens: int, w: int, prefix_lens: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(plain_attention, "SPAN_TOKENS", span_tokens)
    world = World(prefix_lens, [w] * len(prefix_lens), page, **layer)
    mask, depth = random_trees(world.bs, w)
    world.positions = [p + d for p, d in zip(prefix_lens, depth, strict=True)]
    assert_same(world.run(ForwardMode.TARGET_VERIFY, mask), world.reference(mask))


@pages
@layers
@spans
@pytest.mark.parametrize("reach", [1, 16, 17, 33, 49])
def test_a_reach_cuts_the_prefix_of_window_passes(
    page: int, layer: dict, span_tokens: int, reach: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(plain_attention, "SPAN_TOKENS", span_tokens)
    prefix_lens = [3, 50, 17, 0, 33]  # below, at and above it
    world = World(prefix_lens, [7] * 5, page, **layer)
    mask, depth = random_trees(world.bs, 7)
    world.positions = [p + d for p, d in zip(prefix_lens, depth, strict=True)]
    reached = world.run(ForwardMode.TARGET_VERIFY, mask, reach)
    assert_same(reached, world.reference(mask, reach))
    if world.layer.sliding_window_size < 0:  # else the layer itself reaches no further
        assert (reached - world.reference(mask, reach + 1)).abs().max() > 1e-3
        assert (reached - world.reference(mask, reach - 1)).abs().max() > 1e-3


@spans
@pytest.mark.parametrize("mode", [ForwardMode.TARGET_VERIFY, ForwardMode.DECODE, ForwardMode.EXTEND])
@pytest.mark.parametrize("reach", [0, 5])
def test_sliding_layers_find_their_window_in_a_pool_of_their_own(
    mode: ForwardMode, reach: int, span_tokens: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(plain_attention, "SPAN_TOKENS", span_tokens)
    prefix_lens = [3, 50, 17, 0, 33]
    world = World(prefix_lens, [1 if mode.is_decode() else 7] * 5, 1, sliding_window_size=6).slide_apart()
    mask, bound = None, reach if mode.is_target_verify() else 0
    if mode.is_target_verify():
        mask, depth = random_trees(world.bs, 7)
        world.positions = [p + d for p, d in zip(prefix_lens, depth, strict=True)]
    assert_same(world.run(mode, mask, bound), world.reference(mask, bound or 10**9))


@pages
@layers
def test_a_reach_wider_than_every_prefix_changes_no_bit(page: int, layer: dict) -> None:
    prefix_lens = [3, 50, 17, 0, 33]
    for reach in (50, 51, 10**6):
        wide, whole = (World(prefix_lens, [7] * 5, page, **layer) for _ in range(2))
        mask, _ = random_trees(5, 7)
        assert torch.equal(
            wide.run(ForwardMode.TARGET_VERIFY, mask, reach), whole.run(ForwardMode.TARGET_VERIFY, mask)
        )


def test_a_reach_is_of_window_passes_alone() -> None:
    world = World([25, 4], [1, 1], 1)
    assert_same(world.run(ForwardMode.DECODE, reach=3), world.reference())
    world = World([25, 4], [6, 6], 1)
    assert_same(world.run(ForwardMode.EXTEND, reach=3), world.reference())


def test_what_pads_a_reached_span_stays_within_the_slot_table() -> None:
    world = World([60, 50], [7, 7], 1)
    world.req_to_token = world.req_to_token[:, :67].clone()  # the longer request ends where its row does
    assert_same(world.run(ForwardMode.TARGET_VERIFY, reach=20), world.reference(reach=20))
    world = World([60, 5], [7, 7], 1)
    world.req_to_token = world.req_to_token[:, :67].clone()
    assert_same(world.run(ForwardMode.TARGET_VERIFY, reach=57), world.reference(reach=57))


@pytest.mark.parametrize("sinks", [False, True])
@pytest.mark.parametrize("window", [-1, 3, 6])
def test_every_root_path_is_seen_as_a_prefill_of_it_sees_it(window: int, sinks: bool) -> None:
    """A target's layer: what a node gets, its path alone gets at the path's end."""
    prefix, w = 11, 9
    tree = World([prefix], [w], 1, sliding_window_size=window)
    mask, depth = random_trees(1, w)
    tree.positions = [prefix + depth[0]]
    if sinks:
        tree.sink(*SINKS)
    nodes = tree.run(ForwardMode.TARGET_VERIFY, mask)
    assert len({int(m.sum()) for m in mask[0]}) > 3, "else no path is longer than a window"
    for node in range(w):
        path = mask[0, node].nonzero().flatten()
        alone = World([prefix], [len(path)], 1, sliding_window_size=window)
        alone.sinks = tree.sinks
        for what in ("keys", "values"):
            whole = getattr(tree, what)[0]
            getattr(alone, what)[0] = torch.cat([whole[:prefix], whole[prefix:][path]])
        alone.pool.set_kv_buffer(
            alone.layer, alone.slots[0][:prefix], alone.keys[0][:prefix], alone.values[0][:prefix]
        )
        alone.queries[0] = tree.queries[0][path]
        assert_same(nodes[node], alone.run(ForwardMode.EXTEND)[-1])


SINKS = (-1.0, 0.0, 0.5, 1.0, 2.0, 4.0)


@layers
def test_a_sink_takes_its_share_of_every_head(layer: dict) -> None:
    prefix_lens = [25, 0, 4]
    mask, depth = random_trees(3, 7)
    for mode, new, given in ((ForwardMode.TARGET_VERIFY, 7, mask), (ForwardMode.EXTEND, 7, None)):
        world = World(prefix_lens, [new] * 3, 1, **layer).sink(*SINKS)
        if mode.is_target_verify():
            world.positions = [p + d for p, d in zip(prefix_lens, depth, strict=True)]
        with_sinks = world.run(mode, given)
        assert_same(with_sinks, world.reference(given))
        world.sinks = None
        assert (with_sinks - world.run(mode, given)).abs().max() > 1e-2
    world = World([25, 4], [1, 1], 1, **layer).sink(*SINKS)
    assert_same(world.run(ForwardMode.DECODE), world.reference())


@layers
def test_window_without_a_mask(layer: dict) -> None:
    world = World([25, 4], [6, 6], 1, **layer)
    assert_same(world.run(ForwardMode.TARGET_VERIFY, None), world.reference())


def test_a_sibling_is_not_seen() -> None:
    # The control of the tests above: the mask matters, and a window without it says something else.
    world = World([25], [7], 1)
    mask, _ = random_trees(1, 7)
    mask[0, 2, 1] = False
    masked, causal = world.run(ForwardMode.TARGET_VERIFY, mask), world.run(ForwardMode.TARGET_VERIFY, None)
    assert (masked[2] - causal[2]).abs().max() > 1e-2
    assert_same(masked[0], causal[0])


def test_features_it_does_not_have_are_refused() -> None:
    with pytest.raises(ValueError, match="latent attention"):
        PlainAttnBackend(SimpleNamespace(use_mla_backend=True))
    world = World([3], [1], 1)
    world.layer.is_cross_attention = True
    with pytest.raises(ValueError, match="cross-attention"):
        world.run(ForwardMode.DECODE)
