"""What a walk accepted, kept in a target's two pools: SGLang's own, whose slots and rows differ."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from sglang.srt.mem_cache.allocator.swa import SWATokenToKVPoolAllocator
from sglang.srt.mem_cache.memory_pool import MHATokenToKVPool
from sglang.srt.mem_cache.swa_memory_pool import SWAKVPool
from torch import Tensor

from sglang_dflash.kernels import Pools
from sglang_dflash.platforms.cpu.memory import CpuKVPool
from sglang_dflash.step.commit import commit
from sglang_dflash.step.draft_pass import pools_of
from sglang_dflash.tree import DraftTree, Walk, walk

SLOTS, ROWS, WINDOW, W = 200, 60, 12, 5
FULL, SLIDING = (1, 3), (0, 2)


@pytest.fixture
def pool() -> SWAKVPool:
    """Layers 0 and 2 slide; what a row holds tells layer and row."""
    made = SWAKVPool(
        SLOTS, ROWS, 1, torch.float32, 2, 8, [*SLIDING], [*FULL], "cpu", token_to_kv_pool_class=CpuKVPool
    )
    for part in (made.full_kv_pool, made.swa_kv_pool):
        for i, buffer in enumerate([*part.k_buffer, *part.v_buffer]):
            buffer.copy_((1000 * i + torch.arange(len(buffer)))[:, None, None].expand_as(buffer))
    return made


def slots_of_two(pool: SWAKVPool, allocator: SWATokenToKVPoolAllocator) -> Tensor:
    """Each request's slots by position, [2, 40], when all but its last have slid out of the window."""
    slots = torch.empty(2, 0, dtype=torch.int64)
    for _ in range(8):
        slots = torch.cat([slots, allocator.alloc(2 * W).view(W, 2).T], 1)
        if slots.shape[1] > WINDOW + W:
            allocator.free_swa(slots[:, -WINDOW - 2 * W : -WINDOW - W].flatten())
    rows = pool.translate_loc_from_full_to_swa(slots[:, -W:])
    assert not (rows == slots[:, -W:]).any() and len(rows.unique()) == 2 * W
    return slots


def commit_two(slots: Tensor, pools: list[Pools]) -> list[list[int]]:
    """A step at each request's last W slots, in which one accepts nodes 0, 2, 4 and the other its root; gives those."""
    nodes = torch.tensor([[0, 2, 4], [0, 0, 0]])
    walked = Walk(nodes, nodes, torch.tensor([3, 1], dtype=torch.int32), nodes[:, -1])
    window = SimpleNamespace(slots=slots[:, -W:], prefix_lens=torch.tensor([35, 35]))
    tree = SimpleNamespace(tokens=torch.zeros(2, W), max_depth=2)
    draft = SimpleNamespace(options=SimpleNamespace(chain=False), write_context=lambda *_: None)
    given: tuple[Any, ...] = (window, tree, walked, torch.zeros(2 * W, 4), pools, draft, True)
    commit(*given)
    return [[0, 2, 4, 3, 4], [0, 1, 2, 3, 4]]


def moved(part: MHATokenToKVPool, before: list[Tensor], rows: Tensor, taken: list[list[int]]) -> bool:
    """Whether each layer has at these rows what was at the taken ones, and all else as it was."""
    want = [buffer.clone() for buffer in before]
    for old, new in zip(before, want, strict=True):
        for own, nodes in zip(rows, taken, strict=True):
            new[own] = old[own[nodes]]
    return all(map(torch.equal, [*part.k_buffer, *part.v_buffer], want))


@pytest.mark.parametrize("bug", ["", "only full layers'", "by the slots of full layers", "by a table of earlier"])
def test_each_pool_s_rows_are_moved_by_its_own_slots(pool: SWAKVPool, bug: str) -> None:
    allocator = SWATokenToKVPoolAllocator(SLOTS, ROWS, 1, torch.float32, "cpu", pool, need_sort=False)
    earlier = pool.full_to_swa_index_mapping.clone()
    slots = slots_of_two(pool, allocator)
    parts = (pool.full_kv_pool, slots[:, -W:]), (pool.swa_kv_pool, pool.translate_loc_from_full_to_swa(slots[:, -W:]))
    before = [[buffer.clone() for buffer in [*part.k_buffer, *part.v_buffer]] for part, _ in parts]
    pools = pools_of(pool)
    if bug == "only full layers'":
        pools = pools[:1]
    elif bug == "by a table of earlier":
        pools = [pools[0], Pools(pools[1].tensors, pools[1].addresses, earlier)]
    elif bug:
        pools = [pools[0], Pools(pools[1].tensors, pools[1].addresses)]
        slots = slots % (ROWS + 1)  # which the smaller pool has
    taken = commit_two(slots, pools)
    right = [moved(part, old, rows, taken) for old, (part, rows) in zip(before, parts, strict=True)]
    assert right == [True, True] if not bug else not right[1]


def test_a_slot_that_holds_nothing_stays_the_sink_in_both_pools(pool: SWAKVPool) -> None:
    """A request without room, and one that has ended and whose slots overlap has freed."""
    allocator = SWATokenToKVPoolAllocator(SLOTS, ROWS, 1, torch.float32, "cpu", pool, need_sort=False)
    slots = allocator.alloc(2 * W).view(2, W)
    allocator.free(slots[1])
    slots = torch.stack([torch.zeros(W, dtype=torch.int64), slots[1]])
    before = [buffer.clone() for buffer in pool.swa_kv_pool.k_buffer]
    commit_two(slots, pools_of(pool))
    for old, new in zip(before, pool.swa_kv_pool.k_buffer, strict=True):
        assert torch.equal(old, new)


def test_one_pool_has_all_layers() -> None:
    made = CpuKVPool(SLOTS, 1, torch.float32, 2, 8, 4, "cpu", enable_memory_saver=False)
    (rows,) = pools_of(made)
    assert len(rows.tensors) == 8 and rows.rows_by_slot is None


@pytest.mark.parametrize("captured", [False, True])
def test_roots_alone_stay_where_they_are_and_their_graph_has_written_their_context(captured: bool) -> None:
    tree, told = DraftTree.root(torch.tensor([5, 6])), []
    slots, lens, features = torch.tensor([[40], [0]]), torch.tensor([7, 9]), torch.randn(2, 4)
    window = SimpleNamespace(slots=slots, prefix_lens=lens)
    draft = SimpleNamespace(options=SimpleNamespace(chain=False), write_context=lambda *given: told.append(given))
    walked = walk(tree, torch.tensor([[7], [8]]))
    commit(window, tree, walked, features, [], draft, captured)  # type: ignore[arg-type]
    if captured:
        assert not told
    else:
        ((written, positions, at),) = told
        assert written is features and positions is lens and at.tolist() == [40, 0]


@pytest.mark.parametrize("w", [1, W])
def test_what_was_read_of_prompts_gets_its_context_behind_what_walks_accepted(w: int) -> None:
    told: list[tuple[Tensor, ...]] = []
    draft = SimpleNamespace(options=SimpleNamespace(chain=True), write_context=lambda *given: told.append(given))
    window = SimpleNamespace(slots=torch.arange(2 * w).view(2, w) + 40, prefix_lens=torch.tensor([7, 9]))
    nodes = torch.tensor([[0, 1], [0, 0]])[:, :w]
    walked = Walk(nodes, nodes, torch.tensor([min(w, 2), 1], dtype=torch.int32), nodes[:, -1])
    tree = SimpleNamespace(tokens=torch.zeros(2, w))
    rows = torch.arange(3 * w).view(3, w)
    prompts = SimpleNamespace(positions=rows + 100, slots=rows + 200)
    features = torch.arange(5 * w)[:, None]  # of two trees and three windows
    commit(window, tree, walked, features, [], draft, False, prompts)  # type: ignore[arg-type]
    ((written, positions, slots),) = told
    assert written[-3 * w :, 0].tolist() == [*range(2 * w, 5 * w)]
    assert positions[-3 * w :].tolist() == [*range(100, 100 + 3 * w)]
    assert slots[-3 * w :].tolist() == [*range(200, 200 + 3 * w)]
    accepted = {(int(f), int(p), int(s)) for f, p, s in zip(written[: -3 * w, 0], positions, slots, strict=False) if s}
    assert accepted == {(0, 7, 40), (w, 9, 40 + w)} | ({(1, 8, 41)} if w > 1 else set())
