"""Window passes beside FlashInfer, Triton and FlashAttention-4, without a GPU: SGLang's backends are fakes, its kernel
of slot tables is interpreted.

Triton decides when it is imported whether it interprets, so that is done in a process of its own: this file, run.
"""

from __future__ import annotations

import importlib
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import sglang.srt.layers.attention as sglang_attention
import torch
from sglang.srt.layers.attention.base_attn_backend import AttentionBackend
from sglang.srt.layers.radix_attention import AttentionType
from sglang.srt.mem_cache.swa_memory_pool import SWAKVPool

from sglang_dflash.platforms.cpu import vector_math

HEADS, KV_HEADS, SIZE, ROWS, COLUMNS = 4, 2, 8, 6, 400
# SGLang's module and class, and ours, by the name of an attention backend.
THEIRS = {
    "flashinfer": ("flashinfer_backend", "FlashInferAttnBackend"),
    "triton": ("triton_backend", "TritonAttnBackend"),
    "fa4": ("flashattention_backend", "FlashAttentionBackend"),
}
OURS = {"flashinfer": "FlashInferWindows", "triton": "TritonWindows", "fa4": "FlashAttention4Windows"}
OWN = {"flashinfer": {"init_new_workspace": False}, "triton": {}, "fa4": {"fa_impl_ver": 4}}  # what they are made with
# Prefixes of a batch, and of the pass that replays its graph: the last of three requests only pads the second.
LENS, LATER = (1, 100, 257), (300, 7, 1)
REQUESTS = (3, 0, 5)  # their rows in SGLang's table of slots


class FakeBase(AttentionBackend):
    """SGLang's backend, which plans every pass that it is told of."""

    def __init__(self, runner: Any, **own: Any) -> None:
        self.req_to_token_pool, self.token_to_kv_pool = runner.req_to_token_pool, runner.token_to_kv_pool
        self.own, self.planned = own, []
        self.device = runner.device

    def init_cuda_graph_state(self, max_bs: int, max_num_tokens: int) -> None:
        raise AssertionError("masks and indices as long as the context")

    def init_forward_metadata(self, forward_batch: Any) -> None:
        self.planned.append(forward_batch.forward_mode)

    def init_forward_metadata_out_graph(self, forward_batch: Any, in_capture: bool = False) -> None:
        self.planned.append(forward_batch.forward_mode)

    def init_forward_metadata_in_graph(self, forward_batch: Any) -> None:
        self.planned.append(forward_batch.forward_mode)

    def forward_extend(self, q: Any, k: Any, v: Any, layer: Any, *_: Any, **__: Any) -> str:
        return "SGLang's"


class TwoPools(SWAKVPool):
    """The only layer slides, and has a pool of its own: of each prefix the last `window` keys and what comes behind.

    All other slots lead to row 0, which holds what no query may see.
    """

    def __init__(self, whole: torch.Tensor, slots: torch.Tensor, window: int) -> None:
        self.layers_mapping = {0: (0, True)}
        ends = [(n, row) for lens in (LENS, LATER) for n, row in zip(lens, REQUESTS, strict=True)]
        alive = torch.cat([slots[row, max(0, n - window) : n + window] for n, row in ends]).unique()
        self.full_to_swa_index_mapping = torch.zeros(whole.shape[1] + 1, dtype=torch.int64)
        self.full_to_swa_index_mapping[alive] = 1 + torch.randperm(len(alive))
        self.caches = torch.full((2, len(alive) + 1, KV_HEADS, SIZE), 1e4)
        self.caches[:, self.full_to_swa_index_mapping[alive]] = whole[:, alive]

    def get_kv_buffer(self, layer_id: int) -> torch.Tensor:
        return self.caches


def backend(name: str, page_size: int, own_pool: int = 0) -> Any:
    """Ours over the fake, beside a pool whose every slot holds something; what no op may read is not a number.

    own_pool: the window of a layer whose keys have a pool of their own.
    """
    module, base = THEIRS[name]
    fake = ModuleType(module)
    setattr(fake, base, FakeBase)
    sys.modules[f"{sglang_attention.__name__}.{module}"] = fake
    setattr(sglang_attention, module, fake)
    ours = getattr(importlib.import_module(f"sglang_dflash.platforms.cuda.{name}"), OURS[name])
    torch.manual_seed(page_size)
    pages = 1 + torch.randperm(ROWS * COLUMNS // page_size)
    slots = (pages[:, None] * page_size + torch.arange(page_size)).view(ROWS, -1)[:, : COLUMNS - page_size]
    caches = torch.randn(2, (len(pages) + 1) * page_size, KV_HEADS, SIZE)
    one_pool = SimpleNamespace(get_kv_buffer=lambda layer: caches)
    made = ours(
        SimpleNamespace(
            init_new_workspace=False,
            device="cpu",
            req_to_token_pool=SimpleNamespace(req_to_token=slots.int()),
            token_to_kv_pool=TwoPools(caches, slots, own_pool) if own_pool else one_pool,
        )
    )
    made.whole = caches
    return made


def batch(lens: tuple[int, ...], rows: tuple[int, ...], width: int, mask: torch.Tensor | None) -> Any:
    return SimpleNamespace(
        forward_mode=SimpleNamespace(is_target_verify=lambda: True),
        batch_size=len(lens),
        seq_lens=torch.tensor(lens),
        seq_lens_cpu=None,
        req_pool_indices=torch.tensor(rows),
        positions=(torch.tensor(lens)[:, None] + torch.arange(width)).flatten(),
        spec_info=SimpleNamespace(draft_token_num=width, window_mask=mask),
        out_cache_loc=torch.zeros(len(lens) * width, dtype=torch.int64),
    )


def layer(slides: int) -> Any:
    return SimpleNamespace(
        layer_id=0, sliding_window_size=slides or -1, attn_type=AttentionType.DECODER, tp_q_head_num=HEADS,
        tp_k_head_num=KV_HEADS, tp_v_head_num=KV_HEADS, head_dim=SIZE, scaling=0.4, logit_cap=0.0,
        k_scale_float=None, v_scale_float=None,
    )  # fmt: skip


def ancestors(bs: int, width: int) -> torch.Tensor:
    """A random tree's: each node sees itself and what its parent sees."""
    mask = torch.eye(width, dtype=torch.bool).repeat(bs, 1, 1)
    for node in range(1, width):
        mask[torch.arange(bs), node] |= mask[torch.arange(bs), torch.randint(node, (bs,))]
    return mask


def reference(
    one: Any, given: Any, mask: torch.Tensor, qkv: list[torch.Tensor], reach: int, slides: int
) -> torch.Tensor:
    """Each row by itself: softmax over the keys that it sees, prefix and window one after the other."""
    caches, width = one.whole, mask.shape[1]
    q, k, v = (x.view(len(mask), width, -1, SIZE) for x in qkv)
    out = torch.zeros(len(mask), width, HEADS, SIZE)
    for b, (length, row) in enumerate(zip(given.seq_lens.tolist(), given.req_pool_indices.tolist(), strict=True)):
        slots = one.req_to_token_pool.req_to_token[row, :length].long()
        for i in range(width):
            first = max(0, length - reach if reach else 0, length + i - slides if slides else 0)
            own = mask[b, i] & (torch.arange(width) >= (i - slides if slides else 0))
            keys, values = (
                torch.cat([cache[slots[first:]], new[b, own]]).repeat_interleave(HEADS // KV_HEADS, 1)
                for cache, new in ((caches[0], k), (caches[1], v))
            )
            weights = (torch.einsum("hd,lhd->hl", q[b, i], keys) * 0.4).softmax(-1)
            out[b, i] = torch.einsum("hl,lhd->hd", weights, values)
    return out.view(len(mask) * width, -1)


def error(
    name: str, page_size: int, width: int, reach: int, slides: int, captured: bool, own_pool: bool
) -> float:
    """How far a pass is from the reference; a captured one replays what was recorded of other requests."""
    one, rows = backend(name, page_size, slides if own_pool else 0), REQUESTS
    one.reach, one.masks_are_causal = reach, True
    mask = ancestors(3, width)
    if captured:
        one.make_room({width: 4, 1: 8})
        one.init_cuda_graph_state(4, 4 * width)
        buffers = batch((1, 1, 1), (0, 0, 0), width, None)
        one.init_forward_metadata_out_graph(buffers, in_capture=True)
        for lens in (LENS, LATER):
            buffers.seq_lens.copy_(torch.tensor(lens))
            buffers.req_pool_indices.copy_(torch.tensor(rows))
            buffers.out_cache_loc.copy_(behind(one, buffers, width))
            buffers.positions.copy_(batch(lens, rows, width, None).positions)
            buffers.spec_info.window_mask = mask[:2]  # of the requests that are there
            one.init_forward_metadata_out_graph(buffers)
            one.init_forward_metadata_in_graph(buffers)  # what a replay runs
        mask[2] = torch.eye(width, dtype=torch.bool)
        given = buffers
    else:
        given = batch(LENS, rows, width, mask)
        given.out_cache_loc = behind(one, given, width)
        one.init_forward_metadata(given)
    assert not one.planned
    before = one.req_to_token_pool.req_to_token.clone()
    one.req_to_token_pool.req_to_token.fill_(0)  # as if every row had been given away by now
    qkv = [torch.randn(3 * width, heads * SIZE) for heads in (HEADS, KV_HEADS, KV_HEADS)]
    got = one.forward_extend(*qkv, layer(slides), given)
    one.req_to_token_pool.req_to_token.copy_(before)
    written = given.out_cache_loc
    if own_pool:
        written = one.token_to_kv_pool.full_to_swa_index_mapping[written]
    for cache, new in zip(one.token_to_kv_pool.get_kv_buffer(0), qkv[1:], strict=True):
        assert torch.equal(cache[written], new.view(-1, KV_HEADS, SIZE))
    return (got - reference(one, given, mask, qkv, reach, slides)).abs().max().item()


def behind(one: Any, given: Any, width: int) -> torch.Tensor:
    """The slots of a window behind each prefix, [bs * w]."""
    columns = given.seq_lens[:, None] + torch.arange(width)
    return one.req_to_token_pool.req_to_token[given.req_pool_indices[:, None], columns].long().flatten()


WIDTHS = ((1, 0, 0), (2, 0, 0), (16, 0, 0), (16, 60, 0), (9, 0, 9), (5, 30, 70))  # width, reach, what slides
CASES = [
    (name, page_size, width, reach, slides, captured, own_pool)
    for name, page_size, widths in (("flashinfer", 1, WIDTHS), ("triton", 16, WIDTHS[-2:]), ("fa4", 50, WIDTHS[-2:]))
    for width, reach, slides in widths
    for captured in (False, True)
    for own_pool in ((False, True) if slides > reach else (False,))
]


@pytest.fixture(scope="module")
def errors() -> list[float]:
    env = {**os.environ, "TRITON_INTERPRET": "1"}
    run = subprocess.run([sys.executable, __file__], env=env, capture_output=True, text=True, check=True)
    return json.loads(run.stdout.splitlines()[-1])["errors"]  # type: ignore[no-any-return]


@pytest.mark.parametrize("case", range(len(CASES)), ids=[str(case) for case in CASES])
def test_a_pass_sees_its_prefix_and_its_ancestors(errors: list[float], case: int) -> None:
    assert errors[case] < 1e-5


@pytest.fixture(params=THEIRS)
def name(request: pytest.FixtureRequest) -> str:
    return request.param  # type: ignore[no-any-return]


@pytest.fixture
def ours(name: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """One over the fake; both are gone afterwards."""
    module, _ = THEIRS[name]
    own = f"sglang_dflash.platforms.cuda.{name}"
    monkeypatch.setitem(sys.modules, f"{sglang_attention.__name__}.{module}", ModuleType(module))
    monkeypatch.setattr(sglang_attention, module, None, raising=False)
    monkeypatch.delitem(sys.modules, own, raising=False)
    made = backend(name, 1)
    yield made
    del sys.modules[own]


def test_other_passes_are_sglang_s_own(ours: Any, name: str) -> None:
    prefill = batch((3, 4), (1, 2), 1, None)
    prefill.forward_mode = SimpleNamespace(is_target_verify=lambda: False)
    ours.init_forward_metadata(prefill)
    ours.init_forward_metadata_out_graph(prefill)
    ours.init_forward_metadata_in_graph(prefill)
    assert ours.planned == [prefill.forward_mode] * 3
    assert ours.forward_extend(None, None, None, layer(0), prefill) == "SGLang's"
    assert ours.own == OWN[name]
    assert not ours.needs_cpu_seq_lens, "else SGLang waits for the lengths of every step"


def test_one_graph_is_recorded_of_each_batch_size(ours: Any) -> None:
    assert ours.ways(2) is None and ours.ways(64) is None


def test_tables_stay_where_the_first_graphs_found_them(ours: Any) -> None:
    ours.make_room({16: 4, 1: 9})
    table = ours._graph_tables
    assert table.shape == (1, 9, ours.req_to_token_pool.req_to_token.shape[1])
    ours.init_cuda_graph_state(4, 64)  # as each width's graph runner asks
    ours.init_cuda_graph_state(9, 9)
    ours.init_forward_metadata_out_graph(batch((5, 6), (0, 1), 16, None), in_capture=True)
    assert ours._graph_tables is table and ours.pages(own_pool=False)[0].data_ptr() == table.data_ptr()


if __name__ == "__main__":
    vector_math.settle()
    print(json.dumps({"errors": [error(*case) for case in CASES]}))
