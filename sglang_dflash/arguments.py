"""SGLang's arguments and the draft's config settled: checked, made into Options, told to SGLang; and who serves what.

Everything that can be refused is refused here, before anything is loaded; what is not ours to serve goes to SGLang's
own worker, decided here as well. The step never asks again.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

from sglang_dflash import embedded
from sglang_dflash.draft.checkpoint import check_tensors, tensor_shapes_on_disk
from sglang_dflash.draft.config import DraftConfig
from sglang_dflash.options import Options
from sglang_dflash.platforms import PLAIN_ATTENTION, cuda, other_attention

logger = logging.getLogger(__name__)

DEFAULT_NODES = 15
DEFAULT_DEPTH = 8
TOP_K = 16  # candidates a position where the checkpoint names none


def options_of(server_args: Any) -> Options:
    """The options of a server whose DFLASH is ours. Raises ValueError for values that cannot be served."""
    draft = _draft_config(server_args)
    draft.check_draft()
    chain = server_args.speculative_eagle_topk == 1
    longest = draft.max_depth
    depth = _asked_depth(server_args, longest)
    nodes = server_args.speculative_num_draft_tokens
    if nodes is None:
        nodes = min(DEFAULT_NODES, depth or DEFAULT_DEPTH, longest) if chain else DEFAULT_NODES
    if nodes < 0:
        raise ValueError(
            f"--speculative-num-draft-tokens must be 0 (plain decoding) or more, got {nodes}"
        )
    if depth is None:
        depth = longest if chain else min(longest, DEFAULT_DEPTH + nodes // 16)
    depth = min(depth, nodes)
    if chain and nodes > depth:
        raise ValueError(
            f"a chain (--speculative-eagle-topk 1) of {nodes} tokens (--speculative-num-draft-tokens) is longer "
            f"than the {depth} positions drafted; ask for {depth} or fewer, or for a tree"
        )
    block = 1 if nodes == 0 else depth + 1 if draft.causal else draft.block_size
    return Options(draft, nodes, depth, block, chain, min(draft.selector_top_k or TOP_K, draft.vocab_size))


def _asked_depth(server_args: Any, longest: int) -> int | None:
    """Drafted positions as the user asks for them, None where they do not."""
    asked = server_args.speculative_num_steps
    if asked is None and server_args.speculative_dflash_block_size is not None:
        asked = server_args.speculative_dflash_block_size - 1
    if asked is not None and not 1 <= asked <= longest:
        raise ValueError(
            f"the draft drafts 1 to {longest} positions a step, but {asked} were asked for "
            "(--speculative-num-steps, or --speculative-dflash-block-size less one)"
        )
    return asked


def fill_in_embedded_pair(server_args: Any) -> None:
    """Put paths where the embedded pair is named, and its draft where its target is given without one.

    SGLang asks again for a record that it has resolved, and read-only by then: that one is left alone.
    """
    if getattr(server_args, "_resolution_finished", False):
        return
    for field in ("model_path", "speculative_draft_model_path"):
        pair = embedded.resolve(getattr(server_args, field))
        if pair is not None:
            setattr(server_args, field, str(pair.target if field == "model_path" else pair.draft))
    if (server_args.speculative_algorithm or "").upper() == "DFLASH" and _is_embedded_target(
        server_args.model_path
    ):
        server_args.speculative_draft_model_path = server_args.speculative_draft_model_path or str(
            embedded.DRAFT
        )


def _is_embedded_target(path: str) -> bool:
    return Path(path).resolve() == embedded.target_path().resolve()


def settle_arguments(original: Callable[[Any], None], server_args: Any) -> None:
    """Check DFLASH's arguments and tell SGLang how many tokens a step takes; called where SGLang does that.

    Raises ValueError naming the argument or the checkpoint's field that is wrong.
    """
    from sglang.srt.arg_groups.overrides import declare_resolution
    from sglang.srt.platforms import current_platform

    if server_args.speculative_draft_model_path is None:
        raise ValueError(
            f"DFLASH has no draft for the target {server_args.model_path!r}: give one with "
            f"--speculative-draft-model-path (only the embedded target, {embedded.NAME!r}, brings its own)"
        )
    reason = reason_to_hand_over(server_args)
    on_cpu = current_platform.device_type == "cpu"
    if reason and on_cpu:
        raise ValueError(f"{reason}: only SGLang's own DFLASH serves that, and it needs an accelerator")
    if reason:
        logger.info("DFLASH: served by SGLang's own worker, because %s.", reason)
        return original(server_args)
    if on_cpu:
        _check_attention(server_args)
    chosen = options_of(server_args)
    _check_draft(server_args, chosen.draft)
    logger.info(
        "DFLASH: %s of %d nodes, %d deep, drafted in blocks of %d.",
        "chain" if chosen.chain else "tree",
        chosen.nodes,
        chosen.depth,
        chosen.block,
    )
    # SGLang sizes slots, pools and metrics by these; what the user asked for stays readable on the record itself.
    declare_resolution(
        server_args,
        "sglang_dflash",
        speculative_num_draft_tokens=chosen.window,
        speculative_num_steps=1,
        speculative_eagle_topk=1,
        speculative_dflash_block_size=None,
        **({} if on_cpu else _settled_on_cuda(server_args)),
    )
    return original(server_args)


def _settled_on_cuda(server_args: Any) -> dict[str, Any]:
    """SGLang's arguments that follow from what serves window passes on CUDA; a draft follows its target's backend."""
    from sglang.srt.arg_groups.overrides import resolving_view
    from sglang.srt.model_executor.cuda_graph_config import Backend, Phase, with_phase

    view = resolving_view(server_args)
    backend, graphs = cuda.attention_backend(view.dtype), view.cuda_graph_config
    if backend == PLAIN_ATTENTION:
        for phase in Phase.ALL:  # no graph can hold this backend, which asks the device for lengths
            graphs = with_phase(graphs, phase, backend=Backend.DISABLED)
    return {"attention_backend": backend, "cuda_graph_config": graphs}


def _check_attention(server_args: Any) -> None:
    """A backend that reads no window mask would let tree nodes see their siblings: wrong text, without a word."""
    from sglang.srt.arg_groups.overrides import resolving_view

    view = resolving_view(server_args)
    if asked := other_attention(view, PLAIN_ATTENTION):
        raise ValueError(
            f"{asked} (page size {view.page_size}) cannot read a tree: on a CPU DFLASH needs {PLAIN_ATTENTION}, "
            "with any page size; leave the option out"
        )


def _check_draft(server_args: Any, draft: DraftConfig) -> None:
    target = _target_config(server_args)
    draft.check(
        hidden_size=target["hidden_size"],
        vocab_size=target["vocab_size"],
        num_layers=target["num_hidden_layers"],
    )
    path = Path(server_args.speculative_draft_model_path)
    if path.is_dir():
        check_tensors(path, draft)


def reason_to_hand_over(server_args: Any) -> str:
    """Why SGLang's own DFLASH worker serves this, or nothing where ours does."""
    from sglang.srt.platforms import current_platform

    path, draft = Path(server_args.speculative_draft_model_path), _draft_config(server_args)
    who, reason = draft.served_by(tensor_shapes_on_disk(path) if path.is_dir() else ())
    if who != "ours":
        return f"the draft has {reason}"
    for size in ("tp_size", "pp_size", "dp_size", "attn_cp_size"):
        if (getattr(server_args, size, None) or 1) > 1:
            return f"--{size.replace('_', '-')} {getattr(server_args, size)} is more than one"
    if server_args.speculative_draft_window_size is not None:
        return "--speculative-draft-window-size asks for a windowed draft cache"
    if current_platform.device_type == "cpu":
        return ""
    if current_platform.device_type != "cuda":
        return f"trees run on CUDA and on a plain CPU, not on {current_platform.device_name!r}"
    return _reason_on_cuda(server_args, draft)


def _reason_on_cuda(server_args: Any, draft: DraftConfig) -> str:
    from sglang.srt.arg_groups.overrides import resolving_view
    from torch.cuda import get_device_capability

    return cuda.unserved(
        server_args, resolving_view(server_args), draft, _target_config(server_args), get_device_capability()
    )


def _draft_config(server_args: Any) -> DraftConfig:
    path = server_args.speculative_draft_model_path
    return (
        DraftConfig.load(path)
        if Path(path).is_dir()
        else DraftConfig.from_dict(_config_dict(server_args, path))
    )


def _target_config(server_args: Any) -> dict[str, Any]:
    config = _config_dict(server_args, server_args.model_path)
    return config.get("text_config") or config


def _config_dict(server_args: Any, path: str) -> dict[str, Any]:
    """A checkpoint's config from wherever SGLang finds checkpoints."""
    from sglang.srt.utils.hf_transformers_utils import get_config

    return get_config(path, trust_remote_code=server_args.trust_remote_code).to_dict()
