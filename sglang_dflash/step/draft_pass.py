"""The draft model inside SGLang: its network, its KV pool over the target's slots, and a pass of it.

SGLang loads and places the network as it does any draft; here it is told what to draft and gives a lattice back.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from sglang.srt.mem_cache.memory_pool import HybridLinearKVPool, MHATokenToKVPool
from sglang.srt.mem_cache.swa_memory_pool import SWAKVPool
from sglang.srt.model_executor.forward_batch_info import CaptureHiddenMode, ForwardBatch, ForwardMode
from sglang.srt.runtime_context import get_spec
from sglang.srt.speculative.draft_parallel import model_draft_parallel_spec, resolve_draft_parallel_layout
from sglang.srt.speculative.draft_worker_common import build_draft_tp_worker
from sglang.srt.speculative.spec_utils import draft_pp_context, draft_tp_context
from torch import Tensor

from sglang_dflash.budget import Shape
from sglang_dflash.draft.checkpoint import load_mask_embedding
from sglang_dflash.draft.lattice import Candidates
from sglang_dflash.draft.selector import build_selector
from sglang_dflash.kernels import Leads, Noise, Pools
from sglang_dflash.options import Options
from sglang_dflash.step import ranks
from sglang_dflash.step.penalties import Penalised, Penalties
from sglang_dflash.step.window import Window, window_input
from sglang_dflash.tree import DraftTree, grow, grow_chain


class DraftRunner:
    """Drafts with one network for one target.

    options: how much to draft. target: the target's ModelRunner, whose embedding and head the draft shares.
    """

    def __init__(self, options: Options, server_args: Any, gpu_id: int, nccl_port: int, target: Any) -> None:
        self.layout = resolve_draft_parallel_layout(
            model_draft_parallel_spec(
                target.spec_aux_config.draft_model_config, spec_algorithm=target.spec_algorithm
            )
        )
        with draft_pp_context(), draft_tp_context(self.layout):
            self.worker = build_draft_tp_worker(
                server_args=server_args,
                gpu_id=gpu_id,
                nccl_port=nccl_port,
                target_model_config=target.model_config,
                algo_label="DFLASH",
                attention_backend_override=get_spec().speculative_draft_attention_backend,
            ).draft_worker
        self.options = options
        self.runner = self.worker.model_runner
        self.network = self.runner.model
        self._embedding = target.model.get_input_embeddings()
        self.network.embed = self._embedding.forward
        if options.mask_embedding is not None:
            saved = load_mask_embedding(options.mask_embedding, options.draft)
            self.network.mask_embedding = saved.to(self.network.norm.weight)  # device and type
        self._lm_head = target.model.lm_head
        self._logits = target.model.logits_processor._compute_lm_head
        self.follow_target()
        self._grow = grow_chain if options.chain else grow
        # By block and batch size: what a replayed graph leaves behind.
        self._captured: dict[tuple[int, int], tuple[Candidates, DraftTree]] = {}
        self.runner.capture_tail_hooks.append(self._capture_tree)
        target.capture_tail_hooks.append(self._capture_context)
        widest = max(shape.block for shape in options.shapes)
        seen = torch.ones(widest, widest, dtype=torch.bool, device=target.device)
        self._mask = seen.tril() if options.draft.causal else seen

    def follow_target(self) -> None:
        """Called when the target's or the draft's weights are in place, at first and after each update."""
        embedding, head = (ranks.whole(table.weight, 0) for table in (self._embedding, self._lm_head))
        self.selector = build_selector(self.network, embedding=embedding, head=head)

    def bind_pools(self, penalties: Penalties) -> None:
        """Called once, when SGLang has made the draft's KV pool and attention backend; no graph is captured yet.

        penalties: of the target's requests.
        """
        self._penalties = penalties
        self._pools = rows_of(self.runner.token_to_kv_pool)
        self._noise = KnownNoise(len(self.runner.req_to_token_pool.req_to_token), self._mask.device)
        backend = self.runner.attn_backend
        backend.reach, backend.masks_are_causal = self.options.draft_window, self.options.draft.causal

    def write_context(self, features: Tensor, positions: Tensor, slots: Tensor) -> None:
        """Write committed tokens' target features into the draft's KV pool.

        features [T, layers * hidden], positions [T] int64, slots [T] int64; slot 0 takes rows to be dropped.
        Nothing is written where nothing is ever drafted.
        """
        if self.options.largest.nodes == 0:
            return
        context = self.network.project_features(features)
        self.network.write_context(context, positions, slots, self._pools)

    def draft(
        self,
        batch: Any,
        window: Window,
        shape: Shape,
        any_penalised: bool,
        foresee: Callable[[], Leads | None],
    ) -> DraftTree:
        """One draft pass: the tree, or chain, of what may follow the batch's bonus tokens.

        foresee: what else is known of the tokens to come, asked for when the pass is launched. No graph knows of it:
        where something is, the lattice is made anew of the graph's candidates.
        """
        tokens = window.block_tokens
        if shape.nodes == 0:
            return DraftTree.root(tokens[:, 0])
        self._noise.tell(batch.sampling_info, window.prefix_lens)
        result = self.runner.forward(self._forward_batch(batch, window))
        leads, bs = foresee(), len(tokens)
        if result.can_run_graph:
            candidates, tree = self._captured[shape.block, self.runner.decode_cuda_graph_runner.bs]
            if leads is None:
                return ranks.first_ranks_tree(tree.first(bs).smaller(shape.nodes))
            candidates = candidates.first(bs)
        else:
            found = self._penalties.at(batch.req_pool_indices, window.block_positions) if any_penalised else None
            candidates = self._candidates(result.logits_output.hidden_states, bs, shape.block, found)
        return ranks.first_ranks_tree(self._tree(candidates, tokens, shape.nodes, leads))

    def _capture_tree(self, _: Any, output: Any, forward_batch: Any, num_tokens: int) -> None:
        """Called by SGLang at the end of a pass that it captures, and of the two before it that warm up.

        The tree is read after the verify pass, and all graphs share their memory: what a verify graph needs for a
        while may lie where a draft graph left its outputs. So the first pass's tree, which no graph owns, takes it; and
        its candidates those of whichever of several graphs runs. Any batch may have penalised requests once it is
        replayed.
        """
        bs = forward_batch.batch_size
        block = num_tokens // bs
        penalised = self._penalties.at(forward_batch.req_pool_indices, forward_batch.positions)
        candidates = self._candidates(output.hidden_states, bs, block, penalised)
        tree = self._tree(candidates, forward_batch.input_ids.view(bs, block), self.options.grown(block).nodes)
        kept_candidates, kept_tree = self._captured.setdefault((block, bs), (candidates, tree))
        kept_candidates.take(candidates)
        kept_tree.take(tree)

    def _capture_context(self, _: Any, output: Any, forward_batch: Any, num_tokens: int) -> None:
        """Called by SGLang at the end of each pass of the target's that it captures: of roots alone, it is known there
        that all are kept, so the graph writes their context. Rows that pad a batch have slot 0.
        """
        if num_tokens == forward_batch.batch_size:
            self.write_context(output.hidden_states, forward_batch.positions, forward_batch.out_cache_loc)

    def _candidates(self, hidden: Tensor, bs: int, block: int, penalised: Penalised | None = None) -> Candidates:
        """As deep as the largest tree that a pass of this width is asked for, from its hidden [bs * block, H]."""
        options = self.options
        return Candidates.of(
            hidden.view(bs, block, -1)[:, 1 : options.grown(block).depth + 1],
            partial(self._head, penalised, bs),
            self.selector,
            options.top_k,
            self._noise.of(bs),
            multiplier=options.draft.output_multiplier,
            softcap=options.draft.softcap,
        )

    def _tree(self, candidates: Candidates, block_tokens: Tensor, nodes: int, leads: Leads | None = None) -> DraftTree:
        """The tree of so many nodes; block_tokens [bs, block] int64: the pass's, the bonus token first."""
        bonus_tokens = block_tokens[:, 0].contiguous()
        return self._grow(candidates.lattice(bonus_tokens, self.selector, leads), bonus_tokens, nodes)

    def _head(self, penalised: Penalised | None, bs: int, hidden: Tensor) -> Tensor:
        """The target's logits of hidden [bs * d, H], as the target's own will be penalised at the root."""
        logits = ranks.whole(self._logits(hidden, self._lm_head), -1)
        if penalised is not None:
            penalised.at_depths(logits.view(bs, -1, logits.shape[1]))
        return logits[:, : self.options.draft.vocab_size]

    def _forward_batch(self, batch: Any, window: Window) -> ForwardBatch:
        bs, block = window.block_tokens.shape
        mask = self._mask[:block, :block].expand(bs, -1, -1)
        spec_info = window_input(window.block_tokens, window.block_positions, mask, CaptureHiddenMode.NULL)
        forward_batch = ForwardBatch(
            forward_mode=ForwardMode.TARGET_VERIFY,
            batch_size=bs,
            input_ids=spec_info.draft_token,
            positions=spec_info.positions,
            req_pool_indices=batch.req_pool_indices,
            seq_lens=window.prefix_lens,
            seq_lens_cpu=window.host_lens,
            seq_lens_sum=int(window.host_lens.sum()),
            out_cache_loc=None,
            spec_algorithm=batch.spec_algorithm,
            spec_info=spec_info,
            capture_hidden_mode=CaptureHiddenMode.NULL,
        )
        window.plan.bind(forward_batch, self.runner.kv_index_translator, cols=slice(0, block))
        return forward_batch


class KnownNoise:
    """The noise that the samples of a batch will be drawn with, where captured passes look for it.

    A drafted token counts what the draft says, plus its noise times the temperature: what a sample goes by, times the
    temperature, which makes greedy decoding its limit. Rows behind the batch are what an earlier one left there.
    """

    def __init__(self, requests: int, device: Any) -> None:
        seeds, positions = torch.zeros(2, requests, dtype=torch.int64, device=device)
        self._noise = Noise(seeds, positions, torch.zeros(requests, device=device))
        self._silent = True

    def tell(self, info: Any, prefix_lens: Tensor) -> None:
        """Write what holds for a batch. info: its SamplingBatchInfo; prefix_lens [bs] int64."""
        if info.is_all_greedy:
            if not self._silent:
                self._noise.weights.zero_()
            self._silent = True
            return
        seeds, positions, weights = self._first(len(prefix_lens))
        seeds.copy_(info.sampling_seed)
        positions.copy_(prefix_lens)  # the bonus token's: the sample behind it is drawn there
        torch.mul(info.temperatures[:, 0], info.top_ks != 1, out=weights)
        self._silent = False

    def of(self, bs: int) -> Noise | None:
        """What lattices of bs requests are made with; on a CPU None where all of them are greedy."""
        return None if self._silent and self._noise.weights.is_cpu else self._first(bs)

    def _first(self, bs: int) -> Noise:
        return Noise(*(x[:bs] for x in self._noise))


def pools_of(pool: Any) -> list[Pools]:
    """The parts of a target's KV pool: one, or of a target with sliding layers the full ones' and theirs."""
    if isinstance(pool, SWAKVPool):
        return [rows_of(pool.full_kv_pool), rows_of(pool.swa_kv_pool, pool.full_to_swa_index_mapping)]
    return [rows_of(pool)]


def rows_of(pool: Any, rows_by_slot: Tensor | None = None) -> Pools:
    """A KV pool's layers, keys then values, for kernels that move rows. Raises ValueError for another kind of pool.

    Of a pool beside layers that keep a state, those layers that have keys. rows_by_slot: as Pools'.
    """
    if isinstance(pool, HybridLinearKVPool):
        pool = pool.full_kv_pool
    if not isinstance(pool, MHATokenToKVPool) or pool.kv_cache_layout != "nhd":
        raise ValueError(
            f"DFLASH moves rows [heads, size] of a KV pool, and this server's is a {type(pool).__name__} of layout "
            f"{getattr(pool, 'kv_cache_layout', None)!r}: leave out what asks for it, or serve without DFLASH"
        )
    return Pools.of([*pool.k_buffer, *pool.v_buffer], rows_by_slot)
