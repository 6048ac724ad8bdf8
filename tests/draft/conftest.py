"""What SGLang's layers and attention need to run in a test, without a server."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from sglang.srt.layers.radix_attention import AttentionType
from sglang.srt.model_executor.forward_batch_info import ForwardMode
from sglang.srt.model_executor.forward_context import ForwardContext, forward_context
from sglang.srt.runtime_context import get_parallel
from torch import Tensor

from sglang_dflash.kernels import Pools


@pytest.fixture(scope="session", autouse=True)
def one_process() -> None:
    """One rank of tensor parallelism, without torch.distributed: no layer communicates."""
    alone = SimpleNamespace(rank_in_group=0, world_size=1)
    get_parallel().override_permanently(
        tp_size=1, tp_rank=0, tp_group=alone, attn_tp_size=1, attn_tp_rank=0, attn_tp_group=alone
    )


@pytest.fixture(autouse=True)
def inference() -> Iterator[None]:
    with torch.inference_mode():
        yield


class Pool:
    """A KV pool: one row a slot and layer, NaN where nothing was written."""

    def __init__(self, layers: int, slots: int, kv_heads: int, head_dim: int) -> None:
        self.k = torch.full((layers, slots, kv_heads, head_dim), torch.nan)
        self.v = self.k.clone()

    @property
    def pools(self) -> Pools:
        return Pools.of([*self.k, *self.v])

    def set_kv_buffer(self, layer: Any, slots: Tensor, k: Tensor, v: Tensor) -> None:
        self.k[layer.layer_id, slots], self.v[layer.layer_id, slots] = k, v


class DenseBackend:
    """Attention of a window pass, one request at a time."""

    def __init__(self, pool: Pool, req_to_token: Tensor) -> None:
        self.pool, self.req_to_token = pool, req_to_token

    def forward(
        self, q: Tensor, k: Tensor, v: Tensor, layer: Any, batch: Any, save_kv_cache: bool = True
    ) -> Tensor:
        self.pool.set_kv_buffer(layer, batch.out_cache_loc, k, v)
        w = batch.spec_info.draft_token_num
        q = q.view(batch.batch_size, w, layer.tp_q_head_num, layer.head_dim)
        return torch.cat([self._attend(q[i], layer, batch, i) for i in range(batch.batch_size)])

    def _attend(self, q: Tensor, layer: Any, batch: Any, i: int) -> Tensor:
        w, prefix = len(q), int(batch.seq_lens[i])
        slots = self.req_to_token[batch.req_pool_indices[i], : prefix + w]
        window = batch.spec_info.window_mask[i]
        if layer.attn_type == AttentionType.DECODER:
            window = window.tril()
        seen = torch.cat([torch.ones(w, prefix, dtype=torch.bool), window], dim=1)
        if layer.sliding_window_size > -1:
            position = batch.positions.view(-1, w)[i]
            key_position = torch.cat([torch.arange(prefix), position])
            seen &= (key_position - position[:, None]).abs() <= layer.sliding_window_size
        group = layer.tp_q_head_num // layer.tp_k_head_num
        k = self.pool.k[layer.layer_id, slots].repeat_interleave(group, dim=1)
        v = self.pool.v[layer.layer_id, slots].repeat_interleave(group, dim=1)
        scores = torch.einsum("qhd,khd->hqk", q, k) * layer.scaling
        weights = scores.masked_fill(~seen, -torch.inf).softmax(-1)
        return torch.einsum("hqk,khd->qhd", weights, v).flatten(1)


class Bench:
    """A loaded network with a KV pool, and a few requests with shuffled slots."""

    def __init__(self, network: Any, requests: int, room: int) -> None:
        config = network.draft_config
        self.network = network
        self.req_to_token = 1 + torch.randperm(requests * room).view(requests, room)
        slots = requests * room + 1
        self.pool = Pool(config.num_layers, slots, config.num_kv_heads, config.head_dim)

    def write(self, request: int, context: Tensor, start: int = 0) -> None:
        """Context rows of a request from position `start` on, padded with two rows for the sink."""
        positions = torch.arange(start, start + len(context))
        slots = self.req_to_token[request, positions]
        self.network.write_context(
            torch.cat([context, torch.full((2, context.shape[1]), 7.0)]),
            torch.cat([positions, positions.new_zeros(2)]),
            torch.cat([slots, slots.new_zeros(2)]),
            self.pool.pools,
        )

    def block(self, embeds: Tensor, prefix_lens: list[int]) -> Tensor:
        """One block pass over the tokens whose embeddings are embeds [bs, w, H]. Returns hidden states [bs,
        w, H].
        """
        bs, w, _ = embeds.shape
        ids = torch.arange(bs * w).view(bs, w) + self.network.draft_config.mask_token_id + 1  # none is the mask
        return self.tokens(ids, lambda asked: embeds.flatten(0, 1)[asked - ids[0, 0]], prefix_lens)

    def tokens(self, ids: Tensor, embed: Callable[[Tensor], Tensor], prefix_lens: list[int]) -> Tensor:
        """The same over tokens ids [bs, w], whose embeddings the target gives."""
        bs, w = ids.shape
        lens = torch.tensor(prefix_lens)
        positions = (lens[:, None] + torch.arange(w)).flatten()
        rows = torch.arange(bs)
        causal = self.network.draft_config.causal
        mask = torch.ones(w, w, dtype=torch.bool)
        batch = SimpleNamespace(
            forward_mode=ForwardMode.TARGET_VERIFY,
            batch_size=bs,
            seq_lens=lens,
            positions=positions,
            req_pool_indices=rows,
            out_cache_loc=self.req_to_token[rows.repeat_interleave(w), positions],
            spec_info=SimpleNamespace(
                draft_token_num=w, window_mask=(mask.tril() if causal else mask).expand(bs, w, w)
            ),
        )
        self.network.embed = embed
        with forward_context(ForwardContext(attn_backend=DenseBackend(self.pool, self.req_to_token))):
            out = self.network.forward(ids.flatten(), positions, batch)
        return out.hidden_states.view(bs, w, -1)


@pytest.fixture
def bench() -> type[Bench]:
    return Bench
