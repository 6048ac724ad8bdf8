"""No op reads a value on the host: on the meta device there are no values, only shapes."""

from __future__ import annotations

from functools import partial
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from sglang_dflash import kernels
from sglang_dflash.kernels import Emitted, compiled


@pytest.mark.parametrize("kp", [1, 16])
def test_draft_side_ops_need_no_values(kp: int) -> None:
    bs, d, k, n = 4, 15, 16, 63
    with torch.device("meta"):
        unary, _, lse = kernels.topk_lse(torch.empty(bs * d, 1000), k)
        transitions = torch.empty(bs, d, kp, k) if kp > 1 else None
        logp = kernels.lattice_logp(unary.view(bs, d, k), lse.view(bs, d), transitions)
        tokens, bonus = torch.empty(bs, d, k, dtype=torch.int64), torch.empty(bs, dtype=torch.int64)
        *nodes, mask = kernels.grow(tokens, logp, bonus, n)
        assert [x.shape for x in nodes] == [(bs, n + 1)] * 4 and mask.shape == (bs, n + 1, n + 1)
        leads = kernels.Leads(*torch.empty(2, bs, 12, dtype=torch.int64), bonus)
        kernels.follow_leads(logp, kernels.place_leads(unary.view(bs, d, k), tokens, leads)[1], leads)
        assert [x.shape for x in kernels.grow_chain(tokens, logp, bonus, d)] == [(bs, d + 1)] * 2


def test_verify_side_ops_need_no_values() -> None:
    bs, d, w = 4, 15, 64
    with torch.device("meta"):
        ints = torch.empty(bs, w, dtype=torch.int64)
        mask = torch.empty(bs, w, w, dtype=torch.bool)
        nodes, emitted, lens, last = kernels.walk(ints, ints, mask, ints, ints[:, 0], d)
        assert (nodes.shape, emitted.shape, lens.shape, last.shape) == ((bs, d + 1), (bs, d + 1), (bs,), (bs,))
        assert [x.shape for x in kernels.commit_rows(ints, ints[:, 0], nodes, lens, w)] == [(bs * (d + 1),)] * 5


def test_penalties_need_no_values(monkeypatch: pytest.MonkeyPatch) -> None:
    """The plain `penalise` serves a CPU alone; of the compiled one this is all that is not in csrc/."""
    called: list[tuple[str, tuple[Any, ...]]] = []
    ops = SimpleNamespace(**{name: partial(_note, called, name) for name in ("penalise", "count_emitted")})
    monkeypatch.setattr(compiled, "library", lambda: ops)
    bs, w, vocab = 4, 16, 9000
    emitted = Emitted.none(9, vocab, "meta")
    with torch.device("meta"):
        ints, mask = torch.empty(bs, w, dtype=torch.int64), torch.empty(bs, w, w, dtype=torch.bool)
        lens = torch.empty(bs, dtype=torch.int32)
        for tree in ((), (ints, mask)):
            compiled.penalise(torch.empty(bs, w, vocab), ints[:, 0], ints, emitted, *tree)
        for op in (compiled.count_emitted, kernels.count_emitted):
            op(emitted, ints[:, 0], ints, lens)
    assert [name for name, _ in called] == ["penalise", "penalise", "count_emitted"]
    for _, args in called:  # the counts may move: only where they are is told
        assert all(arg is not emitted.counts for arg in args) and any(arg is emitted.address for arg in args)


def _note(called: list[tuple[str, tuple[Any, ...]]], name: str, *args: Any) -> None:
    called.append((name, args))


def test_the_meta_device_catches_a_host_read() -> None:
    with pytest.raises(RuntimeError):
        torch.empty(3, device="meta").max().item()
