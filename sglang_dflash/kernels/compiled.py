"""The hot ops from csrc/, and the one in Triton, under the names and signatures of `plain`, which says what they mean.

The sources of csrc/ are compiled on first use, for the GPU at hand, into tvm-ffi's cache; a library compiled ahead
(`make ops`) is taken instead where there is one of just these sources.
"""

from __future__ import annotations

import functools
import hashlib
import os
import shutil
import tempfile
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sglang_dflash.kernels.flash import tree_attention
from sglang_dflash.kernels.lattice import Noise
from sglang_dflash.kernels.lattice import lattice_logp as plain_lattice_logp
from sglang_dflash.kernels.leads import LEAST, SURE, UNSURE, Leads
from sglang_dflash.kernels.penalties import Emitted
from sglang_dflash.kernels.rows import Pools

__all__ = ["tree_attention"]  # and every other op of `plain`, below

PACKAGE = Path(__file__).parents[1]
NAME = "sglang_dflash_ops"
ARCHITECTURES = "7.5 8.0 8.9 9.0 10.0 12.0"  # compute capabilities that a library compiled ahead holds
NO_NVCC = (
    "there is no nvcc (CUDA_HOME, PATH, /usr/local/cuda): install CUDA's toolkit or set CUDA_HOME, "
    "or install a wheel that holds them compiled (`make ops` on another machine, then build it)"
)
BLOCKS = 264  # of a launch that fills a large GPU twice over
WARPS = 4096  # that keep a large GPU busy where each waits for memory
SAMPLED_PART = 2048  # tokens of a row that a block of `sample` looks at, or more
PENALISED_PART = 4096  # tokens of a request's counts that a block looks at, or more
PART = 4096, 32_768  # logits of a row that a block looks at: shorter ones do not pay, longer ones fill shared memory


def sources() -> list[Path]:
    """The CUDA sources, from an installed package or from its repository. Raises FileNotFoundError without any."""
    directory = PACKAGE / "csrc" if (PACKAGE / "csrc").is_dir() else PACKAGE.parent / "csrc"
    found = sorted(directory.glob("*.cu"))
    if not found:
        raise FileNotFoundError(f"no CUDA sources in {directory}: install the package, or copy csrc/ along with it")
    return found


def ahead() -> Path:
    """Where a library compiled ahead stands: its name tells its sources and tvm-ffi's ABI, so no other is loaded."""
    digest = hashlib.sha256(version("apache-tvm-ffi").rpartition(".")[0].encode())
    for path in [*sources(), *sorted(sources()[0].parent.glob("*.cuh"))]:
        digest.update(path.name.encode() + path.read_bytes())
    return PACKAGE / "kernels" / f"ops-{digest.hexdigest()[:16]}.so"


def nvcc() -> Path | None:
    """CUDA's compiler, where tvm-ffi looks for it."""
    home = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH")
    on_path = shutil.which("nvcc")
    found = Path(home, "bin", "nvcc") if home else Path(on_path or "/usr/local/cuda/bin/nvcc")
    return found if found.exists() else None


@functools.cache
def library() -> Any:
    """The compiled ops, as tvm-ffi loads them. Raises RuntimeError with the compiler's words where it fails."""
    import tvm_ffi
    import tvm_ffi.cpp

    if ahead().exists():
        return tvm_ffi.load_module(str(ahead()))
    if nvcc() is None:
        raise RuntimeError(f"DFLASH's CUDA ops are compiled on first use, and {NO_NVCC}")
    return tvm_ffi.cpp.load(NAME, cuda_files=[str(path) for path in sources()])


def build_ahead() -> None:
    """Compile for every architecture into the package, where `library` and a wheel built next find it."""
    import tvm_ffi.cpp

    os.environ["TVM_FFI_CUDA_ARCH_LIST"] = ARCHITECTURES
    with tempfile.TemporaryDirectory() as directory:
        files = [str(path) for path in sources()]
        made = tvm_ffi.cpp.build(NAME, cuda_files=files, build_directory=directory)
        for stale in ahead().parent.glob("ops*.so"):
            stale.unlink()
        shutil.copy(made, ahead())


def topk_lse(logits: Tensor, k: int, noise: Noise | None = None) -> tuple[Tensor, Tensor, Tensor]:
    rows, vocab = logits.shape
    shortest, longest = PART
    parts = max(1, min(BLOCKS // rows, vocab // shortest), -(-vocab // longest))
    values = logits.new_empty(rows, k, dtype=torch.float32)
    indices = logits.new_empty(rows, k, dtype=torch.int64)
    lse = logits.new_empty(rows, dtype=torch.float32)
    scratch = logits.new_empty(rows, parts, k + 1, dtype=torch.int64)
    library().topk_lse(logits, *(noise or (None, None, None)), values, indices, lse, scratch)
    return values, indices, lse


def lattice_logp(unary: Tensor, lse: Tensor, transitions: Tensor | None) -> Tensor:
    if transitions is not None:  # not a serving path: there `selector_logp` makes them
        return plain_lattice_logp(unary, lse, transitions)
    logp = torch.empty_like(unary)[:, :, None]
    library().lattice_unary(unary, lse, logp)
    return logp


def selector_logp(
    unary: Tensor,
    lse: Tensor,
    tokens: Tensor,
    bonus_tokens: Tensor,
    gate: Tensor,
    predecessors: Tensor,
    successors: Tensor,
) -> Tensor:
    logp = unary.new_empty(*unary.shape, unary.shape[-1])
    library().lattice_selector(unary, lse, tokens, bonus_tokens, gate, predecessors, successors, logp)
    return logp


def place_leads(unary: Tensor, tokens: Tensor, leads: Leads) -> tuple[Tensor, Tensor]:
    placed_unary, placed = torch.empty_like(unary), torch.empty_like(tokens)
    library().place_leads(unary, tokens, leads.tokens, leads.before, placed_unary, placed)
    return placed_unary, placed


def follow_leads(logp: Tensor, tokens: Tensor, leads: Leads) -> Tensor:
    followed = logp.new_empty(*tokens.shape, tokens.shape[2])
    library().follow_leads(logp, tokens, *leads, LEAST, SURE, UNSURE, followed)
    return followed


def grow(
    tokens: Tensor, logp: Tensor, bonus_tokens: Tensor, n: int
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    bs, w = len(tokens), n + 1
    grown, parents, depths = (tokens.new_empty(bs, w) for _ in range(3))
    path_logp, mask = logp.new_empty(bs, w), tokens.new_empty(bs, w, w, dtype=torch.bool)
    library().grow(tokens, logp, bonus_tokens, grown, parents, depths, path_logp, mask)
    return grown, parents, depths, path_logp, mask


def grow_chain(tokens: Tensor, logp: Tensor, bonus_tokens: Tensor, n: int) -> tuple[Tensor, Tensor]:
    grown, path_logp = tokens.new_empty(len(tokens), n + 1), logp.new_empty(len(tokens), n + 1)
    library().grow_chain(tokens, logp, bonus_tokens, grown, path_logp)
    return grown, path_logp


def walk(
    tokens: Tensor, parents: Tensor, mask: Tensor, sampled: Tensor, limit: Tensor | None, d: int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    nodes, emitted = (tokens.new_empty(len(tokens), d + 1) for _ in range(2))
    lens, last = tokens.new_empty(len(tokens), dtype=torch.int32), tokens.new_empty(len(tokens))
    library().walk(tokens, parents, sampled, limit, nodes, emitted, lens, last)
    return nodes, emitted, lens, last


def assign_slots(rows: Tensor, slot_table: Tensor, begin: Tensor, end: Tensor, slots: Tensor) -> None:
    library().assign_slots(rows, slot_table, begin, end, slots)


def open_window(
    slot_table: Tensor,
    rows: Tensor,
    prefix_lens: Tensor,
    held: Tensor,
    most: Tensor,
    bonus_tokens: Tensor,
    mask_token: int,
    w: int,
    block: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    bs = len(rows)
    slots, tokens, positions = (prefix_lens.new_empty(bs, width) for width in (w, block, block))
    deepest = prefix_lens.new_empty(bs)
    library().open_window(
        slot_table, rows, prefix_lens, held, most, bonus_tokens, mask_token, slots, deepest, tokens, positions
    )
    return slots, deepest, tokens, positions


def commit_rows(
    slots: Tensor, prefix_lens: Tensor, nodes: Tensor, lens: Tensor, w: int
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    source, destination, rows, positions, context_slots = (nodes.new_empty(nodes.numel()) for _ in range(5))
    library().commit_rows(
        slots, prefix_lens, nodes, lens, w, source, destination, rows, positions, context_slots
    )
    return source, destination, rows, positions, context_slots


def move_rows(pools: Pools, source: Tensor, destination: Tensor, bs: int) -> None:
    row = pools.tensors[0][0]
    library().move_rows(pools.addresses, pools.rows_by_slot, source, destination, bs, row.nbytes)


def write_context(
    kv: Tensor, k_norm: Tensor | None, cos_sin: Tensor, positions: Tensor, slots: Tensor, pools: Pools, eps: float
) -> None:
    library().write_context(kv, k_norm, cos_sin, positions, slots, pools.addresses.view(2, -1), eps)


def sample(
    logits: Tensor,
    positions: Tensor,
    seeds: Tensor,
    temperatures: Tensor,
    top_ks: Tensor,
    top_ps: Tensor,
    min_ps: Tensor,
    filtered: bool,
) -> Tensor:
    rows, vocab = logits.shape
    parts = max(1, min(4 * BLOCKS // rows, vocab // SAMPLED_PART))
    scratch = positions.new_empty(rows, parts, 2)
    out = positions.new_empty(rows)
    library().sample(logits, positions, seeds, temperatures, top_ks, top_ps, min_ps, filtered, scratch, out)
    return out


def penalise(
    logits: Tensor,
    requests: Tensor,
    positions: Tensor,
    emitted: Emitted,
    tokens: Tensor | None = None,
    mask: Tensor | None = None,
) -> None:
    bs, vocab = len(logits), emitted.counts.shape[1]
    parts = max(1, min(4 * BLOCKS // bs, vocab // PENALISED_PART))
    of = emitted.address, emitted.places, emitted.settings, emitted.fewest
    library().penalise(logits, requests, positions, *of, vocab, tokens, mask, parts)


def count_emitted(emitted: Emitted, requests: Tensor, tokens: Tensor, lens: Tensor) -> None:
    vocab = emitted.counts.shape[1]
    library().count_emitted(emitted.address, emitted.places, vocab, requests, tokens, lens)


def window_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor,
    prefix_lse: Tensor,
    out: Tensor,
    key_cache: Tensor,
    value_cache: Tensor,
    slots: Tensor | None,
    scale: float,
    softcap: float,
) -> None:
    # Query heads of one key that share a warp share its loads; few tokens rather need many warps.
    (tokens, heads, _), at_once = q.shape, 4
    while at_once > 1 and (heads // k.shape[1] % at_once or tokens * heads < WARPS * at_once):
        at_once //= 2
    library().window_attention(
        q, k, v, mask, prefix_lse, out, key_cache, value_cache, slots, scale, softcap, at_once
    )


if __name__ == "__main__":
    build_ahead()
