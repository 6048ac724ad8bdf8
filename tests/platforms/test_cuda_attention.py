"""Which way a window pass goes beside FlashAttention-3, what it is given, what a CUDA graph is recorded of.

SGLang's backend is a fake.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable, Iterator
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import sglang.srt.layers.attention as sglang_attention
import torch
from sglang.srt.layers.attention.base_attn_backend import AttentionBackend
from sglang.srt.layers.radix_attention import AttentionType
from sglang.srt.mem_cache.swa_memory_pool import SWAKVPool

from sglang_dflash import kernels
from sglang_dflash.platforms import WITH_PROMPTS
from sglang_dflash.platforms.cuda import SHORT_PREFIX
from sglang_dflash.platforms.cuda.graphs import capture_passes

HEADS, KV_HEADS, DIM = 4, 2, 8
NARROW, WIDE = 2, 64
OURS, THEIRS = "sglang_dflash.platforms.cuda.fa3", "flashattention_backend"


class FakeBase(AttentionBackend):
    """SGLang's backend, which only a machine with CUDA can import."""

    def init_cuda_graph_state(self, max_bs: int, max_num_tokens: int) -> None: ...
    def init_forward_metadata(self, forward_batch: Any) -> None: ...
    def init_forward_metadata_out_graph(self, forward_batch: Any, in_capture: bool = False) -> None: ...
    def init_forward_metadata_in_graph(self, forward_batch: Any) -> None: ...


@pytest.fixture
def fa3(monkeypatch: pytest.MonkeyPatch) -> Iterator[ModuleType]:
    """Our module over the fake one; both are gone afterwards."""
    fake = ModuleType(THEIRS)
    fake.FlashAttentionBackend = FakeBase
    monkeypatch.setitem(sys.modules, f"{sglang_attention.__name__}.{THEIRS}", fake)
    monkeypatch.setattr(sglang_attention, THEIRS, fake, raising=False)
    before = sys.modules.pop(OURS, None)
    yield importlib.import_module(OURS)
    del sys.modules[OURS]
    if before is not None:
        sys.modules[OURS] = before


@pytest.fixture
def backend(fa3: ModuleType) -> Any:
    """One whose kernels write down how they were called."""
    made = fa3.FlashAttentionWindows()
    made.__dict__.update(
        num_attention_heads=HEADS, num_kv_heads=KV_HEADS, head_dim=DIM, page_size=1, device="cpu",
        kv_cache_dtype=torch.float32, has_softcap=False, num_splits=0, fa_impl_ver=3,
        forward_metadata=SimpleNamespace(page_table=torch.zeros(2, 16, dtype=torch.int32)),
        token_to_kv_pool=SimpleNamespace(get_kv_buffer=lambda layer: ("keys", "values")),
        scheduled=[],
    )  # fmt: skip
    made._get_scheduler_metadata = lambda **asked: made.scheduled.append(asked) or "tiles"
    return made


def batch(width: int, lens: list[int], mask: torch.Tensor | None, bound: int | None = None) -> Any:
    return SimpleNamespace(
        forward_mode=SimpleNamespace(is_target_verify=lambda: True),
        batch_size=len(lens),
        seq_lens=torch.tensor(lens),
        seq_lens_cpu=None if bound is None else torch.tensor([1, bound]),
        spec_info=SimpleNamespace(draft_token_num=width, window_mask=mask),
        out_cache_loc="slots",
    )


def layer(**own: Any) -> Any:
    """A RadixAttention of the target's, or of a causal draft's."""
    usual = {
        "layer_id": 0, "sliding_window_size": -1, "attn_type": AttentionType.DECODER, "tp_q_head_num": HEADS,
        "tp_k_head_num": KV_HEADS, "tp_v_head_num": KV_HEADS, "head_dim": DIM, "scaling": 0.5, "logit_cap": 0.0,
        "k_scale_float": None, "v_scale_float": None,
    }  # fmt: skip
    return SimpleNamespace(**usual | own)


@pytest.mark.parametrize(
    ("width", "bound", "in_one"),
    [
        (NARROW, SHORT_PREFIX + 1, True),
        (WIDE, SHORT_PREFIX, True),
        (WIDE, SHORT_PREFIX + 1, False),
        (WIDE, None, False),
    ],
)
def test_wide_windows_behind_long_or_unknown_prefixes_go_two_ways(
    backend: Any, width: int, bound: int | None, in_one: bool
) -> None:
    backend.init_forward_metadata(batch(width, [5, 6], None, bound))
    assert backend._in_one is in_one
    assert len(backend.scheduled) == (0 if in_one else 1)
    if not in_one:
        assert backend.scheduled[0]["max_seqlen_q"] == width
        assert backend.scheduled[0]["cache_seqlens"].tolist() == [5, 6]


def test_a_draft_that_reaches_no_further_goes_one_way(backend: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    backend.reach = 96
    assert backend.ways(WIDE) is None
    backend.init_forward_metadata(batch(WIDE, [5, 6], None, SHORT_PREFIX + 1))
    assert backend._in_one and not backend.scheduled
    given: list[Any] = []
    monkeypatch.setattr(kernels, "tree_attention", lambda *a: given.append(a) or a[0])
    q, k, v = (torch.zeros(2 * WIDE, heads * DIM) for heads in (HEADS, KV_HEADS, KV_HEADS))
    backend.forward_extend(q, k, v, layer(), batch(WIDE, [5, 6], None))
    assert given[0][-5:] == (96, None, None, 1.0, 1.0)


def test_what_is_kept_in_eight_bits_goes_one_way(backend: Any, called: list[tuple[str, Any]]) -> None:
    """With the scales of its layer, behind any prefix; FlashAttention-3 would round queries too."""
    backend.kv_cache_dtype = torch.float8_e4m3fn
    assert backend.ways(WIDE) is None
    positions, mask = torch.arange(WIDE).repeat(2, 1), torch.ones(2, WIDE, WIDE, dtype=torch.bool)
    run_layers(backend, positions, mask, SHORT_PREFIX + 1, layer(k_scale_float=0.5, v_scale_float=0.25), layer())
    assert [(name, given[-2:]) for name, given in called] == [("one", (0.5, 0.25)), ("one", (1.0, 1.0))]
    assert not backend.scheduled


def test_graphs_are_recorded_of_both_ways_where_there_are_two(fa3: ModuleType, backend: Any) -> None:
    for width, variants in ((NARROW, None), (WIDE, fa3.Ways)):
        seen: list[Any] = []
        runner = SimpleNamespace(
            attn_backend=backend,
            captured_req_width=width,
            backend=SimpleNamespace(capture_one=None),
            model_runner=None,
        )
        capture_passes(lambda r, seen=seen: seen.append(r.attention_graph_variants), runner)
        assert seen == [variants]


@pytest.mark.parametrize(("variant", "in_one"), [("short prefix", True), ("long prefix", False), (None, True)])
def test_a_graph_holds_the_way_it_is_recorded_of(
    fa3: ModuleType, backend: Any, monkeypatch: pytest.MonkeyPatch, variant: str | None, in_one: bool
) -> None:
    monkeypatch.setattr(fa3, "get_capture_attention_variant", lambda: variant)
    backend.make_room({WIDE: 2})
    backend.init_forward_metadata_out_graph(batch(WIDE, [1, 1], None), in_capture=True)
    assert backend._in_one is in_one
    backend.init_forward_metadata_in_graph(batch(WIDE, [1, 1], None))
    assert len(backend.scheduled) == (0 if in_one else 1)


def test_rows_that_pad_a_batch_see_themselves_and_buffers_stay_in_place(backend: Any) -> None:
    backend._in_one = True
    backend.make_room({WIDE: 2, NARROW: 4})
    where = backend._graph_masks[NARROW].data_ptr(), backend._graph_lens.data_ptr()
    given = torch.ones(1, NARROW, NARROW, dtype=torch.bool)
    backend.init_forward_metadata_out_graph(batch(NARROW, [7, 1], given))
    assert (backend._mask.data_ptr(), backend._prefix_lens.data_ptr()) == where
    assert backend._prefix_lens.tolist() == [7, 1]
    assert backend._mask[0].all()
    assert torch.equal(backend._mask[1], torch.eye(NARROW, dtype=torch.bool))


def test_tables_stay_where_the_first_graphs_found_them(
    fa3: ModuleType, backend: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[tuple[int, int]] = []
    monkeypatch.setattr(FakeBase, "init_cuda_graph_state", lambda self, *sizes: asked.append(sizes))
    backend.make_room({16: 4, 1: 9})
    lens, masks = backend._graph_lens, dict(backend._graph_masks)
    backend.init_cuda_graph_state(4, 64)  # as each width's graph runner asks
    backend.init_cuda_graph_state(9, 9)
    assert asked == [(9, 64)]
    assert backend._graph_lens is lens and all(backend._graph_masks[w] is mask for w, mask in masks.items())
    assert masks[16].shape == (4, 16, 16) and masks[1].shape == (9, 1, 1) and len(lens) == 9
    with pytest.raises(ValueError, match="graphs of 10 requests need tables"):
        backend.init_cuda_graph_state(10, 10)


@pytest.mark.parametrize("in_one", [True, False])
@pytest.mark.parametrize("save", [True, False])
def test_each_way_calls_its_kernels(
    backend: Any, monkeypatch: pytest.MonkeyPatch, in_one: bool, save: bool
) -> None:
    calls: list[tuple[str, Any]] = []
    rows = 2 * WIDE
    q, k, v = (torch.zeros(rows, heads * DIM) for heads in (HEADS, KV_HEADS, KV_HEADS))

    def note(name: str, *result: Any) -> Callable[..., Any]:
        return lambda *args, **named: (calls.append((name, (*args, named))), result)[1] if result else None

    monkeypatch.setattr(kernels, "tree_attention", lambda *a: calls.append(("one", a)) or a[0])
    monkeypatch.setattr(kernels, "window_attention", lambda *a: calls.append(("window", a)))
    backend.get_paged_mha_kv_cache = lambda layer: ("keys", "values")
    backend.flash_attn_with_kvcache = note("prefix", torch.zeros(2, WIDE, HEADS, DIM), torch.zeros(HEADS, rows))
    backend.init_forward_metadata(batch(WIDE, [5, 6], None, SHORT_PREFIX + (not in_one)))
    out = backend.forward_extend(q, k, v, layer(), batch(WIDE, [5, 6], None), save)
    assert out.shape == (rows, HEADS * DIM)
    assert [name for name, _ in calls] == (["one"] if in_one else ["prefix", "window"])
    assert ("slots" in [a for a in calls[-1][1] if isinstance(a, str)]) is save
    if not in_one:
        named = calls[0][1][-1]
        assert named["causal"] is False
        assert named["cache_seqlens"].tolist() == [5, 6]


@pytest.mark.parametrize("windows", [WITH_PROMPTS - 1, WITH_PROMPTS])
@pytest.mark.parametrize("join", [False, True])
def test_where_windows_see_each_other_all_keys_are_written_before_any_is_read(
    backend: Any, monkeypatch: pytest.MonkeyPatch, windows: int, join: bool
) -> None:
    calls: list[Any] = []
    backend.token_to_kv_pool.set_kv_buffer = lambda layer, where, k, v, *scales: calls.append(("write", where.loc))
    monkeypatch.setattr(kernels, "tree_attention", lambda *a: calls.append(("read", a[9])) or a[0])
    backend.windows_join = join
    given = batch(NARROW, [5] * windows, None, SHORT_PREFIX)
    given.out_cache_loc_is_physical = True
    backend.init_forward_metadata(given)
    q, k, v = (torch.zeros(windows * NARROW, heads * DIM) for heads in (HEADS, KV_HEADS, KV_HEADS))
    backend.forward_extend(q, k, v, layer(k_scale=None, v_scale=None), given)
    first = [("write", "slots"), ("read", None)]
    assert calls == (first if join and windows == WITH_PROMPTS else [("read", "slots")])


@pytest.fixture
def called(backend: Any, monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, Any]]:
    """The calls that a backend's layers make, by op."""
    calls: list[tuple[str, Any]] = []
    monkeypatch.setattr(kernels, "tree_attention", lambda *a: calls.append(("one", a)) or a[0])
    monkeypatch.setattr(kernels, "window_attention", lambda *a: calls.append(("window", a)))
    backend.get_paged_mha_kv_cache = lambda layer: ("keys", "values")
    prefix = torch.zeros(2, WIDE, HEADS, DIM), torch.zeros(HEADS, 2 * WIDE)
    backend.flash_attn_with_kvcache = lambda **named: calls.append(("prefix", named)) or prefix
    return calls


def run_layers(
    backend: Any, positions: torch.Tensor, mask: torch.Tensor, bound: int, *layers: Any, **asked: Any
) -> None:
    given = batch(WIDE, [500, 6], mask, bound)
    given.positions = positions.flatten()
    backend.init_forward_metadata(given)
    q, k, v = (torch.zeros(2 * WIDE, heads * DIM) for heads in (HEADS, KV_HEADS, KV_HEADS))
    for one in layers:
        backend.forward_extend(q, k, v, one, given, **asked)


@pytest.mark.parametrize("bound", [SHORT_PREFIX, SHORT_PREFIX + 1])
@pytest.mark.parametrize("reach", [0, 20, 90])
def test_a_sliding_layer_goes_to_the_one_op_with_each_row_s_first_key(
    backend: Any, called: list[tuple[str, Any]], reach: int, bound: int
) -> None:
    """A full layer beside it keeps its way, and its call."""
    backend.reach, window = reach, 30
    depths = torch.arange(WIDE) * 2 // 3
    positions, mask = torch.tensor([[500], [6]]) + depths, torch.ones(2, WIDE, WIDE, dtype=torch.bool).tril()
    sliding = layer(sliding_window_size=window)
    run_layers(backend, positions, mask, bound, sliding, layer(), sliding)
    in_one = reach > 0 or bound == SHORT_PREFIX
    assert [name for name, _ in called] == ["one", *(["one"] if in_one else ["prefix", "window"]), "one"]
    asked, full = called[0][1], called[-2][1]
    assert asked[-5] == (min(reach, window) if reach else window)
    first = torch.maximum(positions - window, torch.tensor([[500], [6]]) - (reach or 10**6)).clamp(min=0)
    assert asked[-4].dtype == torch.int32 and torch.equal(asked[-4].long(), first)
    near = (depths[:, None] - depths).abs() <= window
    assert torch.equal(asked[3], mask & near) and not near.all()
    assert called[-1][1][3] is asked[3], "worked out once a pass"
    assert full[3] is backend._mask and (full[-5:-3] == (reach, None) if in_one else full[-1] == 0.0)


def test_a_sliding_layer_with_a_pool_of_its_own_has_its_pages_and_slots(
    backend: Any, called: list[tuple[str, Any]]
) -> None:
    pool = object.__new__(SWAKVPool)
    pool.layers_mapping = {0: (0, False), 1: (0, True)}
    pool.get_kv_buffer = lambda layer: (f"keys {layer}", f"values {layer}")
    backend.token_to_kv_pool, tables = pool, backend.forward_metadata
    tables.swa_page_table, tables.swa_out_cache_loc = object(), "own slots"
    positions, mask = torch.arange(WIDE).repeat(2, 1), torch.ones(2, WIDE, WIDE, dtype=torch.bool)
    run_layers(backend, positions, mask, SHORT_PREFIX, layer(), layer(layer_id=1, sliding_window_size=9))
    asked = [(given[5], *given[7:10]) for _, given in called]
    assert asked == [
        (tables.page_table, "keys 0", "values 0", "slots"),
        (tables.swa_page_table, "keys 1", "values 1", "own slots"),
    ]


def test_layers_with_sinks_go_to_the_one_op_behind_any_prefix(backend: Any, called: list[tuple[str, Any]]) -> None:
    positions, mask, sinks = torch.arange(WIDE).repeat(2, 1), torch.ones(2, WIDE, WIDE, dtype=torch.bool), object()
    run_layers(backend, positions, mask, SHORT_PREFIX + 1, layer(), layer(sliding_window_size=9), sinks=sinks)
    assert [(name, given[-3]) for name, given in called] == [("one", sinks)] * 2


def test_a_causal_layer_of_a_draft_that_is_not_sees_no_later_token(
    backend: Any, called: list[tuple[str, Any]]
) -> None:
    backend.masks_are_causal = False
    positions, mask = torch.arange(WIDE).repeat(2, 1), torch.ones(2, WIDE, WIDE, dtype=torch.bool)
    both_ways = layer(attn_type=AttentionType.ENCODER_ONLY)
    for bound in (SHORT_PREFIX, SHORT_PREFIX + 1):
        called.clear()
        run_layers(backend, positions, mask, bound, layer(), both_ways)
        masks = [given[3] for name, given in called if name != "prefix"]
        assert torch.equal(masks[0], mask.tril()) and masks[1] is backend._mask


def test_what_a_graph_replays_is_worked_out_within_it(backend: Any, called: list[tuple[str, Any]]) -> None:
    """Not in the passes before it that warm up: it would be of their lengths and positions for ever."""
    positions, mask = torch.arange(WIDE).repeat(2, 1), torch.ones(2, WIDE, WIDE, dtype=torch.bool)
    run_layers(backend, positions, mask, SHORT_PREFIX, layer(sliding_window_size=9))
    assert backend._seen
    backend.init_forward_metadata_in_graph(batch(WIDE, [5, 6], mask))
    assert not backend._seen


def test_what_an_op_does_not_have_is_refused(backend: Any) -> None:
    with pytest.raises(NotImplementedError, match=r"layer 3 asks attention for \['q_rope'\]"):
        backend.forward_extend(None, None, None, layer(layer_id=3), batch(WIDE, [5], None), q_rope=torch.zeros(HEADS))
