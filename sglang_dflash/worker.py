"""The DFLASH worker: one speculative step, from the last accepted tokens to the next.

features -> draft block -> lattice -> grow -> verify -> sample -> walk -> commit
   ^                                                                     |
   +------------- accepted tokens' features, written as draft KV <-------+
"""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from sglang.kernels.fused_op import set_fused_op_backend
from sglang.kernels.spec import KernelBackend
from sglang.srt.configs.hybrid_arch import mambaish_config
from sglang.srt.layers.logprob_processor import compute_spec_logprobs
from sglang.srt.managers.utils import GenerationBatchResult
from sglang.srt.model_executor.cuda_graph_config import Backend
from sglang.srt.model_executor.forward_batch_info import CaptureHiddenMode, ForwardBatch, ForwardMode
from sglang.srt.runtime_context import get_exec, get_observability
from sglang.srt.speculative.base_spec_worker import BaseSpecWorker
from sglang.srt.speculative.spec_utils import (
    commit_mamba_states_after_verify,
    draft_pp_context,
    draft_tp_context,
    prepare_mamba_track_for_verify,
)
from torch import Tensor

from sglang_dflash import kernels
from sglang_dflash.arguments import options_of
from sglang_dflash.checkpoints import Checkpoint
from sglang_dflash.kernels import Leads
from sglang_dflash.metrics import step_metrics
from sglang_dflash.platforms import WITH_PROMPTS
from sglang_dflash.step import ranks
from sglang_dflash.step.carry import Carry
from sglang_dflash.step.commit import commit
from sglang_dflash.step.draft_pass import DraftRunner, pools_of
from sglang_dflash.step.foresight import Foresight
from sglang_dflash.step.grammar import Grammars
from sglang_dflash.step.penalties import Penalties
from sglang_dflash.step.plan import Planner, Step
from sglang_dflash.step.prompts import Prompts, PromptWindows
from sglang_dflash.step.results import StepResult
from sglang_dflash.step.sampling import adjust_logits, sample_nodes
from sglang_dflash.step.upload import upload
from sglang_dflash.step.window import Window, window_input
from sglang_dflash.tree import DraftTree, Walk, walk
from sglang_dflash.updates import DraftUpdater, TargetUpdater


@dataclass(frozen=True)
class Launched:
    """A step up to its verify pass. positions [bs * w] int64: of the tree's nodes."""

    step: Step
    window: Window
    tree: DraftTree
    prompts: PromptWindows | None
    positions: Tensor
    grammars: Grammars | None


class DFlashWorker(BaseSpecWorker):
    """Drafts trees and verifies them; SGLang's scheduler drives it, with overlap or without.

    Built by SGLang with its server arguments, device number, port for collectives, and the target's worker.
    """

    def __init__(self, server_args: Any, gpu_id: int, nccl_port: int, target_worker: Any) -> None:
        super().__init__()
        self._target_worker = target_worker
        self.target = target_worker.model_runner
        self.options = options_of(server_args)
        if self.target.device == "cuda":
            kernels.use_compiled()
            if self.target.dtype == torch.float32:  # asked for to be exact; SGLang's kernels are made for 16 bits
                set_fused_op_backend(KernelBackend.TORCH)
        self.draft = DraftRunner(self.options, server_args, gpu_id, nccl_port, self.target)
        self._draft_worker = self.draft.worker
        self._check_updates(server_args)
        if self.target.device == "cuda":
            from sglang_dflash.platforms.cuda.graphs import set_widths

            set_widths(self.target, self.options.verify_widths())
            set_widths(self.draft.runner, self.options.draft_widths())
        largest = self.options.largest
        # What SGLang's gauges tell.
        self.speculative_num_steps, self.speculative_num_draft_tokens = largest.depth, largest.verified
        self.keeps_states = mambaish_config(self.target.model_config) is not None
        self.foresight = Foresight(self.options.leads)
        metrics = get_observability().enable_metrics and ranks.is_first()
        self.metrics = step_metrics(self.options, server_args, metrics)

    # -- what SGLang sets up ---------------------------------------------------------------------------------------

    def alloc_memory_pool(
        self,
        memory_pool_config: Any = None,
        req_to_token_pool: Any = None,
        token_to_kv_pool_allocator: Any = None,
    ) -> None:
        with draft_tp_context(self.draft.layout):
            super().alloc_memory_pool(memory_pool_config, req_to_token_pool, token_to_kv_pool_allocator)

    def init_attention_backends(self) -> None:
        with draft_pp_context(), draft_tp_context(self.draft.layout):
            super().init_attention_backends()
        requests, on_gpu = len(self.target.req_to_token_pool.req_to_token), self.target.device == "cuda"
        self.penalties = Penalties(requests, self.target.model_config.vocab_size, self.target.device)
        self.draft.bind_pools(self.penalties)
        self._target_pools = pools_of(self.target.token_to_kv_pool)
        if states := getattr(self.target.attn_backend, "linear_attn_backend", None):
            states.chains = self.options.chain
        self.planner = Planner(self.options, requests, on_gpu, self.metrics)
        self.prompts = Prompts(self.planner, self.options.prompts_join)
        self.target.attn_backend.windows_join = self.options.prompts_join

    def init_cuda_graphs(self) -> None:
        graphs = get_exec().graph.cuda_graph_config.decode.backend != Backend.DISABLED
        with draft_pp_context(), draft_tp_context(self.draft.layout):
            self.draft.worker.init_cuda_graphs(capture_decode_cuda_graph=graphs and self.options.largest.nodes > 0)
        if graphs and self.target.device == "cuda":
            drafting, agreed = self.draft.runner.decode_cuda_graph_runner, ranks.first_ranks_number
            drafts = drafting.keep_fast(agreed) if self.options.largest.nodes else {}
            self.planner.expect(self.target.decode_cuda_graph_runner.keep_fast(agreed), drafts)

    def weight_update_runners(self) -> list[tuple[str, Any]]:
        return [("draft", self.draft.runner)]

    def _check_updates(self, server_args: Any) -> None:
        """Put ours in place of SGLang's updaters, which weigh nothing that they are given."""
        config, model = self.target.model_config, self.target.model
        checkpoint = Checkpoint(config.model_path, config.revision, server_args.download_dir)
        self.target.weight_updater = TargetUpdater.around(
            self.target.weight_updater,
            follow=self.draft.follow_target,
            tensors=checkpoint.shapes_here(),
            tied=model.lm_head.weight is model.get_input_embeddings().weight,  # configs say it twice, or not at all
        )
        self.draft.runner.weight_updater = DraftUpdater.around(
            self.draft.runner.weight_updater, follow=self.draft.follow_target, config=self.options.draft
        )

    @property
    def spec_v2_attn_backends(self) -> tuple[Any, ...]:
        return (self.target.attn_backend, self.draft.runner.attn_backend)

    # -- the step --------------------------------------------------------------------------------------------------

    @torch.inference_mode()
    def forward_batch_generation(
        self,
        batch: Any,
        on_publish: Callable[[Tensor], None] | None = None,
        grammar_barrier: Callable[[], None] | None = None,
        pp_proxy_tensors: Any = None,
    ) -> GenerationBatchResult:
        """Run one batch: a prefill (chunked or mixed with decoding rows), or a speculative step.

        batch: a ScheduleBatch whose window slots are allocated. on_publish: told the new lengths as soon as they are
        known. grammar_barrier: brings grammars up to the tokens already accepted.
        """
        if batch.forward_mode.is_extend():
            return self._prefill(batch, on_publish, grammar_barrier)
        return self._step(batch, on_publish, grammar_barrier)

    def _prefill(
        self, batch: Any, publish: Callable[[Tensor], None] | None, grammar_barrier: Callable[[], None] | None
    ) -> GenerationBatchResult:
        if batch.has_grammar and batch.decoding_reqs and grammar_barrier is not None:
            grammar_barrier()  # a mixed batch samples running requests too; those that come in have said nothing
        self.prompts.leave(batch.reqs)
        found = self.penalties.prefill(batch)
        if found is not None:
            batch.sampling_info = dataclasses.replace(batch.sampling_info, penalizer_orchestrator=found)
        result = self._target_worker.forward_batch_generation(
            batch, capture_hidden_mode=CaptureHiddenMode.FULL, return_kv_loc_plan=True
        )
        self.planner.prefill(batch)
        result.new_seq_lens = batch.seq_lens
        if publish is not None:
            publish(batch.seq_lens)
        features, result.logits_output.hidden_states = result.logits_output.hidden_states, None
        plan, result.kv_loc_plan = result.kv_loc_plan, None
        self.draft.write_context(
            features, _extend_positions(batch), plan.write_ids(self.draft.runner.kv_index_translator)
        )
        first = result.next_token_ids
        if found is not None:
            one = torch.ones_like(first, dtype=torch.int32)
            self.penalties.emitted(batch.req_pool_indices, first[:, None].to(torch.int64), one)
        result.next_draft_input = Carry.of(first, batch.seq_lens)
        return result

    def _step(
        self, batch: Any, publish: Callable[[Tensor], None] | None, grammar_barrier: Callable[[], None] | None
    ) -> GenerationBatchResult:
        joined = self.prompts.take(batch.reqs)
        if joined:
            self.penalties.begin([*joined])
            self.planner.begin([*joined])
        step = self.planner.plan(batch, joined)
        slot_table = self.target.req_to_token_pool.req_to_token
        least = WITH_PROMPTS - len(batch.reqs) if slot_table.is_cuda else 0  # in plain attention keys always come first
        prompts = PromptWindows.of(joined, step.shape.verified, least, slot_table)
        window = Window.open(batch, self.target, step.shape, self.options.draft.mask_token_id)
        leads = partial(self._leads, batch, grammar_barrier)
        tree = self.draft.draft(batch, window, step.shape, step.penalised, leads)
        step.clock.drafted()
        grammars = Grammars(batch, tree) if batch.has_grammar else None
        verified, positions = self._verify(batch, window, tree, prompts)
        step.clock.verified()
        result = StepResult(
            logits_output=verified.logits_output,
            next_draft_input=Carry.awaited(len(batch.reqs), batch.device),
            can_run_cuda_graph=verified.can_run_cuda_graph,
            speculative_num_draft_tokens=self.options.window,
            read=joined,
            learn=partial(self.planner.learn, step),
        )
        launched = Launched(step, window, tree, prompts, positions, grammars)
        if grammars is not None and grammar_barrier is not None:
            grammar_barrier()  # where nothing was drafted nobody has asked
        if grammars is None or publish is None or self.keeps_states:
            return self._accept(result, batch, launched, publish)
        # While the pass runs SGLang takes in the results of the step before, and calls this then: masks need the host.
        result.delay_sample_func = partial(self._accept, result, copy.copy(batch), launched, publish)
        return result

    @torch.inference_mode()
    def _accept(
        self, result: StepResult, batch: Any, launched: Launched, publish: Callable[[Tensor], None] | None
    ) -> StepResult:
        """What of a step's tree the target's samples accept, kept and told."""
        step, window, tree, grammars = launched.step, launched.window, launched.tree, launched.grammars
        output = result.logits_output
        features, output.hidden_states = output.hidden_states, None
        if grammars is not None:
            grammars.mask_ahead(output.next_token_logits)
        walked = self._sample_and_walk(batch, window, output, launched.positions, tree, step.penalised, grammars)
        if grammars is not None:
            self.planner.checked(grammars)
        if step.penalised:
            self.penalties.emitted(batch.req_pool_indices, walked.tokens, walked.lens)
        new_lens = window.prefix_lens + walked.lens
        if publish is not None:
            publish(new_lens)
        captured = result.can_run_cuda_graph
        commit(window, tree, walked, features, self._target_pools, self.draft, captured, launched.prompts)
        if self.keeps_states:
            self._commit_states(batch, walked, tree.tokens.shape[1])
        step.clock.done()
        self.planner.catch_up()
        result.next_token_ids = walked.tokens.flatten()
        # A root alone emits one token, as the host knows before; and no shape is smaller, to learn of.
        result.accept_lens = walked.lens if step.shape.nodes else torch.ones(len(walked.lens), dtype=torch.int32)
        result.next_draft_input.fill(walked.last, new_lens)
        result.new_seq_lens = new_lens
        result.speculative_output_stride = walked.tokens.shape[1]
        result.nodes = walked.nodes if step.choice.shape else None
        return result

    def _leads(self, batch: Any, grammar_barrier: Callable[[], None] | None) -> Leads | None:
        """What grammars let come next. While the draft's pass runs, the host waits for the step before it."""
        if not batch.has_grammar:
            return None
        if grammar_barrier is not None:
            grammar_barrier()
        return self.foresight.leads(batch, self.target.device)

    def _verify(
        self, batch: Any, window: Window, tree: DraftTree, prompts: PromptWindows | None
    ) -> tuple[GenerationBatchResult, Tensor]:
        """The target's pass, with logits at every node, features there and of the prompts beside them; and the nodes'
        positions [bs * w].
        """
        bs, width = tree.tokens.shape
        positions = window.prefix_lens[:, None] + tree.depths if width > 1 else window.block_positions
        tokens, places, mask = rows = tree.tokens, positions, tree.mask
        columns, plan, batch.seq_lens_cpu = slice(0, width), window.plan, window.host_lens
        if prompts is not None:
            batch, plan = prompts.behind(batch, window, self.target)
            tokens, places, mask = (torch.cat(both) for both in zip(rows, prompts.rows, strict=True))
        spec_info = window_input(tokens, places, mask, CaptureHiddenMode.FULL)
        batch.forward_mode = ForwardMode.TARGET_VERIFY
        batch.input_ids = spec_info.draft_token
        batch.spec_info = spec_info
        batch.seq_lens_sum = None
        prepare_mamba_track_for_verify(batch)
        forward_batch = ForwardBatch.init_new(
            batch,
            self.target,
            capture_hidden_mode=CaptureHiddenMode.FULL,
            return_hidden_states_before_norm=False,
            kv_loc_plan=plan,
            write_cols=columns,
        )
        verified = self._target_worker.forward_batch_generation(
            batch=None, forward_batch=forward_batch, is_verify=True
        )
        output = verified.logits_output
        output.next_token_logits = output.next_token_logits[: bs * width]
        return verified, positions.flatten()

    def _commit_states(self, batch: Any, walked: Walk, width: int) -> None:
        """In layers that keep one: the state behind the last walked node, and what the prefix cache keeps before."""
        rows = _walked_rows(walked, width)
        commit_mamba_states_after_verify(self._target_worker, batch, walked.lens, rows, draft_token_num=width)

    def _sample_and_walk(
        self,
        batch: Any,
        window: Window,
        output: Any,
        positions: Tensor,
        tree: DraftTree,
        any_penalised: bool,
        grammars: Grammars | None,
    ) -> Walk:
        bs, width = tree.tokens.shape
        logits = output.next_token_logits
        found = self.penalties.at(batch.req_pool_indices, positions) if any_penalised else None
        adjust_logits(logits.view(bs, width, -1), batch.sampling_info, tree, found)
        sampled = sample_nodes(logits, batch.sampling_info, positions, tree, grammars)
        walked = walk(tree, sampled, window.deepest)
        if batch.return_logprob:
            compute_spec_logprobs(batch, output, sampled.flatten(), accept_index=_walked_rows(walked, width))
        return walked


def _walked_rows(walked: Walk, width: int) -> Tensor:
    """Rows of the walked nodes in the verify pass's flat output [bs * width, ...], int64 [bs, D + 1]."""
    first = torch.arange(len(walked.nodes), device=walked.nodes.device)[:, None] * width
    return walked.nodes + first


def _extend_positions(batch: Any) -> Tensor:
    """Each prefilled token's position, [T] int64, from the host's lengths."""
    lengths = zip(batch.prefix_lens, batch.extend_lens, strict=True)
    flat = torch.cat([torch.arange(start, start + length) for start, length in lengths])
    return upload(batch.seq_lens.device, flat)
