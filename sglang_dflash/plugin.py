"""What SGLang loads: puts this package's DFLASH in place of SGLang's own. Every hook and patch is registered here.

SGLang calls `register` in every process it starts, before it reads its arguments, whatever it is to serve: so what
only DFLASH needs is imported when DFLASH is asked for.
"""

from __future__ import annotations

import functools
import logging
import multiprocessing
from collections.abc import Callable
from typing import Any

from sglang.srt.plugins.hook_registry import HookRegistry, HookType

from sglang_dflash import SGLANG, other_sglang
from sglang_dflash.platforms import add_plain_attention, cpu, eager_windows, register_plain_attention

logger = logging.getLogger(__name__)


def register() -> None:
    """Name the plain attention backend, and hook where SGLang decides about DFLASH: names, arguments, worker.

    SGLang applies what hooks it can and goes on without the others, so another release than ours is left alone whole.
    """
    if other := other_sglang():
        if multiprocessing.parent_process() is None:
            logger.warning(
                "sglang_dflash is made for SGLang %s and changes nothing in this one, %s: SGLang serves DFLASH by "
                "itself. For trees, pip install sglang==%s.", SGLANG, other, SGLANG,
            )  # fmt: skip
        return
    add_plain_attention()
    if cpu.activate():
        from sglang_dflash.platforms.cpu.hooks import HOOKS

        _register(HOOKS)
    HookRegistry.register(
        "sglang.srt.server_args.ServerArgs.resolve_once", _before_resolving, HookType.BEFORE
    )
    HookRegistry.register(
        "sglang.srt.arg_groups.speculative_hook._handle_dflash", _settle_arguments, HookType.AROUND
    )
    HookRegistry.register(
        "sglang.srt.speculative.spec_info.SpeculativeAlgorithm.create_worker", _create_worker, HookType.AROUND
    )


def _before_resolving(server_args: Any) -> None:
    """Every process that runs a model comes by here, and has imported by then what this does."""
    register_plain_attention()
    _prepare_layers()
    from sglang_dflash import arguments

    arguments.fill_in_embedded_pair(server_args)


@functools.cache
def _prepare_layers() -> None:
    """On a plain CPU, where some layers of SGLang's have Triton kernels alone."""
    if cpu.activate():
        from sglang.srt.arg_groups.resolution_hooks import register_resolution_hook

        from sglang_dflash.platforms.cpu.gpt_oss import SETTLED, settle_model

        _register(SETTLED)
        register_resolution_hook("handle_model_specific_adjustments")(settle_model)
        wrapper = "sglang.srt.layers.attention.attention_registry.attn_backend_wrapper"
        HookRegistry.register(wrapper, _serve_layers, HookType.BEFORE)
        HookRegistry.apply_hooks()


def _serve_layers(runner: Any, full_attn_backend: Any) -> None:
    """The model is loaded, its attention is about to be made: what that imports is known by now."""
    from sglang.srt.configs.hybrid_arch import hybrid_gdn_config

    from sglang_dflash.platforms.cpu import gpt_oss
    from sglang_dflash.targets import GPT_OSS

    if hybrid_gdn_config(runner.model_config) is not None:
        from sglang_dflash.platforms.cpu.gdn import HOOKS

        _register(HOOKS)
    if GPT_OSS in runner.model_config.hf_config.architectures:
        _register(gpt_oss.HOOKS)
    HookRegistry.apply_hooks()


def _register(hooks: dict[str, tuple[Any, HookType]]) -> None:
    for target, (hook, kind) in hooks.items():
        HookRegistry.register(target, hook, kind)


def _settle_arguments(original: Callable[[Any], None], server_args: Any) -> None:
    from sglang_dflash import arguments

    arguments.settle_arguments(original, server_args)
    take_over_requests()


@functools.cache  # a hook is registered once
def take_over_requests() -> None:
    """Accept rates told by path, and samples of one request with seeds of their own."""
    from sglang_dflash import metrics
    from sglang_dflash.step import seeds

    managers = "sglang.srt.managers"
    manager = f"{managers}.tokenizer_manager.TokenizerManager"
    HookRegistry.register(f"{manager}._calculate_spec_decoding_metrics", metrics.by_path, HookType.AROUND)
    HookRegistry.register(f"{manager}._send_one_request", seeds.seed_each_sample, HookType.AROUND)
    write = f"{managers}.multi_tokenizer_mixin.write_data_for_multi_tokenizer"
    HookRegistry.register(write, _tell_tokenizer_workers, HookType.BEFORE)
    HookRegistry.apply_hooks()


def _tell_tokenizer_workers(port_args: Any, server_args: Any, scheduler_info: dict[str, Any]) -> Any:
    """Processes of --tokenizer-worker-num load no plug-ins; all that reaches them is what they unpickle."""
    return (port_args, server_args, _Informed(scheduler_info)), {}


class _Informed(dict[str, Any]):
    """A dict that is a plain one where it is unpickled, and where what becomes of requests is ours as well."""

    def __reduce__(self) -> Any:
        return _inform, (dict(self),)


def _inform(scheduler_info: dict[str, Any]) -> dict[str, Any]:
    take_over_requests()
    return scheduler_info


def _create_worker(original: Callable[..., Any], algorithm: Any, server_args: Any) -> Any:
    from sglang_dflash import arguments

    if not algorithm.is_dflash() or arguments.reason_to_hand_over(server_args):
        return original(algorithm, server_args)
    _take_over()
    if arguments.keeps_states_on_cuda(server_args):
        _take_over_states()
    from sglang_dflash.worker import DFlashWorker

    return DFlashWorker


def _take_over() -> None:
    """What else changes in a process whose DFLASH is ours: the draft's network, who is admitted, the slots that a step
    takes, where its runs end, what sessions keep of them, and CUDA's attention and graphs.
    """
    from sglang.srt.models.registry import ModelRegistry
    from sglang.srt.platforms import current_platform

    from sglang_dflash import metrics, streaming
    from sglang_dflash.draft.config import ARCHITECTURES
    from sglang_dflash.draft.network import DFlashDraftModel
    from sglang_dflash.step import admission, carry, penalties, prompts, results, sampling, seeds, session
    from sglang_dflash.updates import select_runners

    ModelRegistry.models.update(dict.fromkeys(ARCHITECTURES, DFlashDraftModel))
    managers = "sglang.srt.managers"
    around = {
        f"{managers}.scheduler.validate_dflash_request": admission.refusal,
        f"{managers}.scheduler.Scheduler.get_new_batch_prefill": prompts.join_running,
        f"{managers}.schedule_batch.ScheduleBatch._new_tokens_required_next_decode_spec_v2": carry.new_tokens_required,
        f"{managers}.scheduler_components.batch_result_processor.SchedulerBatchResultProcessor._resolve_spec_v2_tokens":
            results.settle_runs,
        f"{managers}.scheduler_components.metrics_reporter.SchedulerMetricsReporter.update_spec_metrics":
            results.count_live,
        f"{managers}.scheduler_components.metrics_reporter.SchedulerMetricsReporter.report_decode_stats":
            metrics.by_path_when_told,
        f"{managers}.scheduler_components.output_streamer.SchedulerOutputStreamer.stream_output":
            streaming.Teller().tell,
        "sglang.srt.model_executor.runner.eager_runner.get_eager_max_batch_size": eager_windows,
        "sglang.srt.layers.sampler.Sampler._sample_from_probs": sampling.sample_from_probs,
        "sglang.srt.sampling.sampling_batch_info.SamplingBatchInfo.from_schedule_batch": seeds.give_seeds,
        "sglang.srt.sampling.sampling_batch_info.SamplingBatchInfo.adjusted_from_schedule_batch":
            penalties.leave_uncounted,
        "sglang.srt.session.streaming_session.StreamingSession.try_cache_finished_req": session.keep_what_is_written,
        f"{managers}.scheduler_components.weight_updater.SchedulerWeightUpdaterManager._select_runners": select_runners,
    }  # fmt: skip
    if current_platform.device_type == "cuda":
        from sglang_dflash.platforms.cuda import graphs, register_attention

        register_attention()
        runners = "sglang.srt.model_executor.runner"
        around[f"{runners}.decode_cuda_graph_runner.DecodeCudaGraphRunner.capture"] = graphs.capture_passes
        around[f"{runners}.decode_cuda_graph_runner.get_batch_sizes_to_capture"] = graphs.keep_sizes
        around[f"{runners}.base_cuda_graph_runner.freeze_gc"] = graphs.freeze_once
        around["sglang.kernels.ops.memory.small_copy.try_small_copy"] = graphs.leave_to_torch
    for target, hook in around.items():
        HookRegistry.register(target, hook, HookType.AROUND)
    assign = "sglang.srt.mem_cache.allocation.assign_req_to_token_pool_func"
    HookRegistry.register(assign, carry.assign_slots, HookType.REPLACE)
    HookRegistry.apply_hooks()


def _take_over_states() -> None:
    """CUDA's gated delta nets, of which most targets have none."""
    from sglang_dflash.platforms.cuda.states import WindowStates, keep_windows_apart

    backend = "sglang.srt.layers.attention.linear.gdn_backend.GDNAttnBackend"
    HookRegistry.register(backend, WindowStates, HookType.REPLACE)
    overlap = "sglang.srt.mem_cache.memory_pool.conv_window_dedup_enabled"
    HookRegistry.register(overlap, keep_windows_apart, HookType.AROUND)
    HookRegistry.apply_hooks()
