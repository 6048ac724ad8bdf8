"""Graphs of several widths, without a GPU: each choosable shape has one, and none is silently run without."""

from __future__ import annotations

import functools
import gc
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from sglang.srt.model_executor import cuda_graph_buffer_registry
from sglang.srt.model_executor.cuda_graph_config import CudaGraphConfig, Phase, with_phase
from sglang.srt.model_executor.runner import base_cuda_graph_runner, get_batch_sizes_to_capture
from sglang.srt.model_executor.runner_utils import buffers
from sglang.srt.runtime_context import get_context, get_server_args

from sglang_dflash.budget import Shape
from sglang_dflash.options import Options
from sglang_dflash.platforms.cuda import graphs

ANY = 1 << 30
LADDER = [(0, 0, ANY), (1, 1, 512), (2, 2, 341), (4, 4, 204), (7, 7, 128), (15, 10, 64), (31, 15, 32), (63, 15, 2)]


def options(causal: bool = True) -> Options:
    shapes = [Shape(n, d, d + 1 if causal or n == 0 else 16, most) for n, d, most in LADDER]
    return Options(None, tuple(shapes), chain=False, top_k=16)  # type: ignore[arg-type]


def runner(requests: int, windows_join: bool = False) -> Any:
    backend = SimpleNamespace(windows_join=windows_join)
    return SimpleNamespace(req_to_token_pool=SimpleNamespace(size=requests), attn_backend=backend)


@pytest.fixture
def up_to_256() -> Any:
    config = with_phase(CudaGraphConfig(), Phase.DECODE, bs=[1, 8, 256], max_bs=256)
    with get_context().override_server_args(cuda_graph_config=config):
        yield


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("requests", [5, 48, 256])
def test_every_shape_has_graphs_for_all_batches_that_may_take_it(up_to_256: Any, causal: bool, requests: int) -> None:
    chosen = options(causal)
    verify, draft = runner(requests), runner(requests)
    graphs.set_widths(verify, chosen.verify_widths())
    graphs.set_widths(draft, chosen.draft_widths())
    verified, drafted = graphs._sizes_by_width(verify), graphs._sizes_by_width(draft)
    for shape in chosen.shapes:
        most = min(shape.most, requests)
        assert max(verified[shape.verified]) == most
        assert not shape.nodes or max(drafted[shape.block]) >= most
    tokens = [width * max(sizes) for width, sizes in verified.items()]
    assert tokens == sorted(tokens, reverse=True)  # the largest first: their memory serves the others
    assert verify.max_shared_logits_buffer_rows() == max(w * max(sizes) for w, sizes in verified.items()) <= 1024
    assert verify.decode_num_tokens_per_req(num_draft_tokens=8) == 8
    assert verify.decode_num_tokens_per_req(num_draft_tokens=99) == verify.decode_num_tokens_per_req() == 64


def test_passes_that_read_prompts_have_graphs_of_more_windows_than_requests(up_to_256: Any) -> None:
    verify = runner(48, windows_join=True)
    graphs.set_widths(verify, options().verify_widths())
    most = {width: max(sizes) for width, sizes in graphs._sizes_by_width(verify).items()}
    assert most == {1: 48, 2: 304, 3: 218, 5: 150, 8: 112, 16: 80, 32: 48, 64: 2}


def test_sglang_captures_all_of_them_those_of_more_windows_than_it_has_requests_too(up_to_256: Any) -> None:
    verify = runner(48, windows_join=True)
    verify.server_args = get_server_args()
    graphs.set_widths(verify, options().verify_widths())
    for width, sizes in graphs._sizes_by_width(verify).items():
        config = with_phase(CudaGraphConfig(), Phase.DECODE, bs=sizes, max_bs=max(sizes))
        with get_context().override_server_args(cuda_graph_config=config):
            arguments: dict[str, Any] = {"captured_req_width": width, "gathered_buffer_required": False}
            assert max(get_batch_sizes_to_capture(verify, **arguments)[0]) <= 48, "by itself"
            captured, _ = graphs.keep_sizes(get_batch_sizes_to_capture, verify, **arguments)
            assert set(captured) >= set(sizes) and max(captured) == max(sizes)


def test_small_passes_have_graphs_of_powers_of_two(up_to_256: Any) -> None:
    verify = runner(256)
    graphs.set_widths(verify, options().verify_widths())
    sizes = graphs._sizes_by_width(verify)
    assert sizes[1][:9] == [1, 2, 4, 8, 16, 32, 64, 80, 96] and sizes[8][:6] == [1, 2, 4, 8, 10, 12]
    assert sizes[32][:6] == [1, 2, 3, 4, 6, 8] and sizes[64] == [1, 2]


def test_a_pass_is_warmed_up_once_but_a_runners_first() -> None:
    runs: list[str] = []

    def captures(key: str, forward: Any, *, post_warmup_hook: Any) -> None:  # as SGLang's backend does
        outputs = [forward() for _ in range(3)]
        assert outputs[0] == outputs[2] == key and post_warmup_hook == "hook"

    capture = graphs._warmed_once(captures)
    for key in ("wide", "narrow", "narrower"):
        capture(key, lambda key=key: runs.append(key) or key, post_warmup_hook="hook")
    assert runs == ["wide"] * 3 + ["narrow"] * 2 + ["narrower"] * 2


def test_all_graphs_of_a_model_leave_their_hidden_states_in_the_same_rows() -> None:
    passes = {"first": torch.randn(6, 4), "wider": torch.randn(8, 4), "one": torch.randn(1, 4)}
    kept: dict[str, Any] = {}
    model_runner = SimpleNamespace(shared_hidden=None, max_shared_logits_buffer_rows=lambda: 8)
    for key, hidden in passes.items():  # of a runner each
        capture = graphs._in_shared_rows(lambda key, forward: kept.update({key: forward()}), model_runner)
        capture(key, lambda hidden=hidden: SimpleNamespace(hidden_states=hidden))
    assert len({output.hidden_states.data_ptr() for output in kept.values()}) == 1
    assert [len(output.hidden_states) for output in kept.values()] == [6, 8, 1]
    assert torch.equal(kept["one"].hidden_states, passes["one"])  # the last that ran
    assert torch.equal(kept["wider"].hidden_states[1:], passes["wider"][1:])


def test_a_draft_that_drafts_nothing_has_no_graphs_and_no_logits(up_to_256: Any) -> None:
    plain = Options(None, (Shape(0, 0, 1, ANY),), chain=False, top_k=16)  # type: ignore[arg-type]
    draft = runner(8)
    graphs.set_widths(draft, plain.draft_widths())
    assert draft.max_shared_logits_buffer_rows() == 0 and draft.decode_num_tokens_per_req() == 1


@pytest.fixture
def collections() -> Iterator[list[int]]:
    """How much garbage was collected in each full collection."""
    seen: list[int] = []

    def note(phase: str, about: dict[str, int]) -> None:
        if (phase, about["generation"]) == ("stop", 2):
            seen.append(about["collected"])

    gc.callbacks.append(note)
    yield seen
    gc.callbacks.remove(note)


@pytest.mark.parametrize("once", [True, False])
def test_garbage_is_collected_once_for_the_runners_of_all_widths(
    up_to_256: Any, collections: list[int], monkeypatch: pytest.MonkeyPatch, once: bool
) -> None:
    freeze = base_cuda_graph_runner.freeze_gc
    if once:
        freeze = functools.partial(graphs.freeze_once, base_cuda_graph_runner.freeze_gc)

    class Runner:
        def __init__(self, *_: Any, **__: Any) -> None:
            with freeze(False):
                assert gc.get_freeze_count() > 0
            self.capture_bs = [1]

    monkeypatch.setattr(graphs, "DecodeCudaGraphRunner", Runner)
    monkeypatch.setattr(graphs, "freeze_gc", freeze)
    monkeypatch.setattr(graphs, "parts_of", lambda backend: [backend])
    verify = runner(256)
    verify.attn_backend.make_room = lambda most: None
    graphs.set_widths(verify, options().verify_widths())
    graphs.WindowGraphs(verify)
    assert len(collections) == (2 if once else 2 + 2 * len(LADDER)) and gc.get_freeze_count() == 0


class OnAGpu(torch.Tensor):
    """As far as SGLang asks a tensor itself."""

    is_cuda = True


@pytest.mark.parametrize("ours", [True, False])
def test_what_passes_read_is_copied_by_nothing_that_is_compiled_anew(
    monkeypatch: pytest.MonkeyPatch, ours: bool
) -> None:
    def launch(destinations: Any, sources: Any) -> bool:
        raise RuntimeError("launched")

    sglangs = functools.partial(graphs.leave_to_torch, launch) if ours else launch
    monkeypatch.setattr("sglang.kernels.ops.memory.small_copy.try_small_copy", sglangs)
    sources = [torch.arange(6).view(2, 3), torch.arange(3, dtype=torch.int32), torch.arange(5).int()]
    dtypes = torch.int64, torch.int32, torch.int64
    destinations = [torch.zeros(x.shape, dtype=dtype) for x, dtype in zip(sources, dtypes, strict=True)]
    copies = [
        functools.partial(copy, [x.as_subclass(OnAGpu) for x in destinations], sources)
        for copy in (cuda_graph_buffer_registry._grouped_foreach_copy_, buffers._grouped_foreach_copy_)
    ]
    for copy in copies:
        if ours:
            copy()
            assert all(map(torch.equal, destinations, [*sources[:2], sources[2].long()]))
            torch._foreach_zero_(destinations)
        else:
            with pytest.raises(RuntimeError, match="launched"):
                copy()


def test_a_pass_without_a_graph_of_its_width_is_an_error() -> None:
    made = object.__new__(graphs.WindowGraphs)
    made._runners = {8: SimpleNamespace(can_run_graph=lambda batch: batch.batch_size <= 4, execute=lambda *_: "ran")}
    batch = SimpleNamespace(batch_size=4, spec_info=SimpleNamespace(draft_token_num=8))
    assert made.can_run_graph(batch) and made.execute(batch) == "ran"
    batch.spec_info.draft_token_num = 7
    with pytest.raises(LookupError, match=r"7 tokens a request has no CUDA graph: there are graphs of \[8\]"):
        made.can_run_graph(batch)


def test_no_batch_is_padded_to_a_size_that_takes_longer_than_a_larger_one(monkeypatch: pytest.MonkeyPatch) -> None:
    few = {1: 5.0, 2: 3.8, 32: 4.0, 64: 4.4, 128: 5.6}  # ms, of passes of two tokens a request
    many = {192: 7.6, 224: 12.7, 256: 9.4, 288: 11.5, 320: 11.3}
    monkeypatch.setattr(graphs, "_replayed", lambda runner, size: (few | many)[size] / 1000)
    sizes = sorted([*few, 24, 48, *many])
    made = object.__new__(graphs.WindowGraphs)
    made._runners = {2: SimpleNamespace(capture_bs=sizes, max_bs=320)}
    seconds = made.keep_fast(agreed=lambda number: number + 1)  # the first rank's
    # Of few tokens none is left out, nor by a difference that may be chance.
    assert sizes == [1, 2, 24, 32, 48, 64, 128, 192, 256, 288, 320]
    timed = {size: pytest.approx(took / 1000 + 1e-6) for size, took in (few | many).items() if size != 224}
    assert seconds == {2: timed}
