"""What /metrics says of a step has SGLang's labels, and SGLang's accept rates divide by a path's length."""

from __future__ import annotations

from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import numpy as np
import prometheus_client
import pytest
from sglang.srt.managers.tokenizer_manager import TokenizerManager
from sglang.srt.observability.metrics_collector import SchedulerMetricsCollector
from sglang.srt.runtime_context import get_context, get_parallel, get_spec

from sglang_dflash import embedded
from sglang_dflash.budget import Shape
from sglang_dflash.draft.config import DraftConfig
from sglang_dflash.metrics import Clock, by_path, sglangs_labels, step_metrics
from sglang_dflash.options import Options

RANKS = {"tp_rank": 0, "pp_rank": 0, "moe_ep_rank": 0, "dp_rank": None, "attn_tp_rank": 0, "attn_cp_rank": 0}


@pytest.fixture
def server_args() -> Iterator[Any]:
    """A published server: 31 nodes, 6 deep, so a window of 32 tokens and paths of 7."""
    published = get_context().override_server_args(
        enable_metrics=True,
        served_model_name="my-model",
        extra_metric_labels={"zone": "a"},
        speculative_algorithm="DFLASH",
        speculative_num_draft_tokens=32,
        speculative_dflash_block_size=7,
    )
    with published as args, get_parallel().override(**RANKS):
        yield args


def test_labels_are_those_of_sglangs_own_metrics(server_args: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    sglangs: dict[str, Any] = {}
    monkeypatch.setattr(SchedulerMetricsCollector, "__init__", lambda self, labels, **_: sglangs.update(labels))
    SchedulerMetricsCollector.init_new(
        server_args=server_args, enable_priority_scheduling=False, enable_lora=False, enable_hierarchical_cache=False
    )
    assert sglangs_labels(server_args) == sglangs
    assert sglangs["model_name"] == "my-model" and sglangs["engine_type"] == "unified" and sglangs["zone"] == "a"


def test_a_step_is_counted_under_them(server_args: Any) -> None:
    shapes = Shape(0, 0, 1, 256), Shape(31, 6, 7, 32)
    options = Options(DraftConfig.load(embedded.DRAFT), shapes, chain=False, top_k=16)
    metrics, clock = step_metrics(options, server_args, enabled=True), Clock(on_gpu=False, parts=True)
    clock.drafted()
    clock.verified()
    clock.done()
    assert metrics is not None
    emitted = np.array([3, 0, 1, 5, 1, 2])  # the second request had ended before
    metrics.step_done(clock, 1, emitted, contexts=[512, 512, 513, 9000, 40_000, 100], prompts=2)
    labels = {name: str(value) for name, value in sglangs_labels(server_args).items()}
    assert prometheus_client.REGISTRY.get_sample_value("sglang:dflash_tree_nodes", labels) == 31
    told = {name: prometheus_client.REGISTRY.get_sample_value(f"sglang:dflash_{name}_total", {**labels, **more})
            for name, more in (("shape_steps", {"nodes": "31"}), ("steps", {}), ("accepted_drafts", {"depth": "2"}),
                               ("prompts_beside", {}))}
    assert told == {"shape_steps": 1, "steps": 5, "accepted_drafts": 2, "prompts_beside": 2}
    behind = [
        prometheus_client.REGISTRY.get_sample_value(f"sglang:dflash_context_{name}_total", {**labels, "context": bound})
        for name in ("steps", "tokens")
        for bound in ("512", "2048", "8192", "32768", "+Inf")
    ]
    assert behind == [2, 1, 0, 1, 1, 5, 1, 0, 5, 1]


def test_an_accept_rate_is_over_the_positions_of_a_path(server_args: Any) -> None:
    told = SimpleNamespace(
        spec_verify_ct=[10], spec_num_correct_drafts=[30], completion_tokens=[40], spec_correct_drafts_histogram=[]
    )
    meta: dict[str, Any] = {}
    by_path(TokenizerManager._calculate_spec_decoding_metrics, None, meta, told, 0)
    assert (meta["spec_accept_rate"], meta["spec_num_proposed_drafts"]) == (30 / (10 * 6), 60)
    assert get_spec().speculative_num_draft_tokens == 32  # what sizes slots is left alone


def test_where_sglangs_own_worker_serves_it_is_sglangs() -> None:
    with get_context().override_server_args(speculative_num_draft_tokens=16, speculative_dflash_block_size=None):
        assert by_path(lambda: get_spec().speculative_num_draft_tokens) == 16
