"""SGLang's arguments and the draft's config settled: checked, made into Options, told to SGLang; and who serves what.

Everything that can be refused is refused here, before anything is loaded; what is not ours to serve goes to SGLang's
own worker, decided here as well. The step never asks again.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from sglang_dflash import embedded
from sglang_dflash.budget import Shape
from sglang_dflash.checkpoints import Checkpoint
from sglang_dflash.draft.checkpoint import MASK_EMBEDDING, check_tensors, load_mask_embedding
from sglang_dflash.draft.config import DraftConfig
from sglang_dflash.kernels import limits
from sglang_dflash.options import Options
from sglang_dflash.platforms import PLAIN_ATTENTION, Need, cpu, cuda, other_attention
from sglang_dflash.targets import Target

logger = logging.getLogger(__name__)

# Trees by nodes and depth, from which a step takes what pays at its load; measured on H100s (docs/gpu.md).
LADDER = ((0, 0), (1, 1), (2, 2), (4, 4), (7, 7), (15, 10), (31, 15), (63, 15))
DEFAULT_NODES = 63
FEWER_NODES = 31  # on a CPU, where each token costs; beside a pool of sliding layers, which SGLang sizes by them
NODES_WITH_STATES = 7  # SGLang reserves a state a node for each request: some 50 MB in a target of 9B parameters
MOST_TOKENS = 1024  # of a verify pass: any GPU is short of arithmetic by then, and a wider tree only waits for it
# Trees of more nodes than the first pay while a GPU waits for its weights alone: in passes of so many tokens, about.
NARROW, MOST_WIDE_TOKENS = 31, 128
UNBOUNDED = 1 << 30
PREFILLED = 16  # prompts that one CUDA graph holds; a batch of more is launched op by op, and long enough not to wait
LONG_PREFILL = 2048  # tokens of a pass for which a GPU takes longer than its host to launch it op by op
SGLANGS_REQUESTS = 48  # at once, where SGLang decides for DFLASH
TOP_K = 16  # candidates a position where the checkpoint names none

# Ways to share a model or a batch that a step does not know.
SIZES = ("pp_size", "attn_dp_size", "attn_cp_size", "dcp_size")
# Servers in parts, and memory pools other than one row a slot.
HANDED_OVER = (
    "enable_pdmux",
    "enable_two_batch_overlap",
    "enable_page_major_kv_layout",
    "enable_unified_memory",
    "enable_hisparse",
    "enable_kv_cache_sharding",
    "encoder_only",
    "language_only",
)
# With layers that keep a state: ways to keep one that is not of the last token that the host took, or not as it was.
HANDED_OVER_WITH_STATES = (
    "enable_streaming_session",
    "enable_hierarchical_cache",
    "enable_int8_mamba_checkpoint",
    "enable_linear_replayssm",
    "enable_linear_replayssm_spec",
)
# What SGLang reads for other ways to speculate, the value at which it asks for nothing, and why it has no effect here.
_SAMPLED = "a drafted token is accepted if and only if the target sampled just this"
WITHOUT_EFFECT: dict[str, tuple[Any, str]] = {
    "speculative_accept_threshold_single": (1.0, _SAMPLED),
    "speculative_accept_threshold_acc": (1.0, _SAMPLED),
    "speculative_use_rejection_sampling": (False, _SAMPLED),
    "speculative_use_block_verification": (False, _SAMPLED),
    "speculative_adaptive": (False, "trees are chosen by what pays, unless nodes and depth are given"),
    "speculative_adaptive_config": (None, "trees are chosen by what pays, unless nodes and depth are given"),
    "speculative_token_map": (None, "the draft uses the target's whole vocabulary"),
    "speculative_draft_sink_size": (None, "a draft's window is its last tokens alone"),
    "speculative_domino_candidate_pool_size": (2048, "the draft is no Domino draft"),
}


def options_of(server_args: Any) -> Options:
    """The options of a server whose DFLASH is ours. Raises ValueError for values that cannot be served."""
    draft = _draft_config(server_args)
    draft.check_draft()
    chain = server_args.speculative_eagle_topk == 1
    depth, nodes = _asked_depth(server_args, draft.max_depth), server_args.speculative_num_draft_tokens
    if nodes is not None and nodes < 0:
        raise ValueError(f"--speculative-num-draft-tokens must be 0 (plain decoding) or more, got {nodes}")
    top_k = min(draft.selector_top_k or TOP_K, draft.vocab_size)
    longest = depth or draft.max_depth
    usual = longest if chain else min(_default_nodes(server_args), _paths(top_k, longest))
    bound = usual if nodes is None else nodes
    _check_bounds(bound, min(bound, longest), top_k, chain)
    fixed = nodes == 0 or None not in (nodes, depth)
    trees = {bound: min(bound, longest)} if fixed else _trees(bound, longest, top_k, chain)
    if not draft.causal:  # drafted whole, whatever is used of it
        trees = {n: min(n, longest) for n in trees}
    shapes = [_shape(n, deep, draft, fixed) for n, deep in sorted(trees.items())]
    window = server_args.speculative_draft_window_size or draft.draft_window
    mask_embedding = _draft_checkpoint(server_args).beside(MASK_EMBEDDING)
    return Options(draft, tuple(shapes), chain, top_k, window, mask_embedding, _prompts_join(server_args))


def _prompts_join(server_args: Any) -> bool:
    """Whether verify passes read prompts beside their trees: on one rank, of targets of plain attention (a state would
    be of the wrong window), where prompts come apart from decoding requests and find their prefixes on the device.
    """
    apart = server_args.enable_lora or server_args.enable_hierarchical_cache or server_args.enable_mixed_chunk
    return not (apart or server_args.tp_size > 1 or _target(server_args).needs)


def _default_nodes(server_args: Any) -> int:
    """Nodes of the largest tree where the user does not say."""
    from sglang.srt.platforms import current_platform

    target = _target(server_args)
    if Need.DELTA_NETS in target.needs:
        return NODES_WITH_STATES
    return FEWER_NODES if target.two_pools or current_platform.device_type == "cpu" else DEFAULT_NODES


def _trees(bound: int, longest: int, top_k: int, chain: bool) -> dict[int, int]:
    """Depth by nodes of the trees, or chains, that a step may take: none of more nodes than bound, none deeper."""
    if chain:
        return {n: n for n in (*(min(deep, bound) for _, deep in LADDER), bound)}
    trees = {n: usual_depth(n, longest) for n in [*(n for n, _ in LADDER if n < bound), bound]}
    # Of a single candidate a position there is but one path, and a usual depth may not hold its nodes.
    return {n: deep if n <= _paths(top_k, deep) else min(n, longest) for n, deep in trees.items()}


def usual_depth(nodes: int, longest: int) -> int:
    """Positions drafted for trees of so many nodes, no more than a block holds: those of the next larger one."""
    return min(nodes, longest, next((deep for n, deep in LADDER if n >= nodes), longest))


def _shape(nodes: int, depth: int, draft: DraftConfig, fixed: bool) -> Shape:
    block = 1 if nodes == 0 else depth + 1 if draft.causal else draft.block_size
    return Shape(nodes, depth, block, UNBOUNDED if fixed else most_requests(nodes))


def most_requests(nodes: int) -> int:
    """Requests of a batch for which trees of so many nodes may pay."""
    if nodes == 0:
        return UNBOUNDED
    return max(1, (MOST_TOKENS if nodes <= NARROW else MOST_WIDE_TOKENS) // (nodes + 1))


def _paths(top_k: int, depth: int) -> int:
    """Nodes of the tree of all paths."""
    return sum(top_k**level for level in range(1, depth + 1))


def _check_bounds(nodes: int, depth: int, top_k: int, chain: bool) -> None:
    if chain and nodes > depth:
        raise ValueError(
            f"a chain (--speculative-eagle-topk 1) of {nodes} tokens (--speculative-num-draft-tokens) is longer "
            f"than the {depth} positions drafted; ask for {depth} or fewer, or for a tree"
        )
    if top_k > limits.CANDIDATES:
        raise ValueError(
            f"the draft's selector_top_k {top_k} is above {limits.CANDIDATES}, the most candidates a position that a "
            f"tree is grown from: set it to {limits.CANDIDATES} or less in the draft's config.json"
        )
    if nodes > limits.NODES:
        raise ValueError(
            f"--speculative-num-draft-tokens {nodes} is above {limits.NODES}, the most nodes of a tree: "
            f"ask for {limits.NODES} or fewer"
        )
    if nodes > (paths := _paths(top_k, depth)):
        raise ValueError(
            f"--speculative-num-draft-tokens {nodes} is above {paths}, all the paths of {top_k} candidates a position "
            f"in {depth} positions: ask for {paths} nodes or fewer, or for more positions (--speculative-num-steps)"
        )


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
    chosen = options_of(server_args)
    if on_cpu:
        _check_attention(server_args)
    else:
        _check_shared_memory(chosen)
    _check_draft(server_args, chosen)
    for line in _said_at_start(server_args):
        logger.info("DFLASH: %s.", line)
    logger.info("DFLASH: %s.", _told(chosen))
    # SGLang sizes slots, pools and metrics by these; what the user asked for stays readable on the record itself.
    declare_resolution(
        server_args,
        "sglang_dflash",
        speculative_num_draft_tokens=chosen.window,
        speculative_num_steps=1,
        speculative_eagle_topk=1,
        speculative_dflash_block_size=None,
        speculative_draft_window_size=None,
        speculative_draft_model_quantization=None,  # SGLang lets a draft inherit its target's
        speculative_draft_kv_cache_dtype="auto",  # of the draft's own type, likewise
        **_settled_admission(server_args, chosen),
        **_settled_pool(server_args),
        **({} if on_cpu else _settled_on_cuda(server_args)),
    )
    original(server_args)
    # SGLang reads it no more: what remains of it is a path's length, by which accept rates are told (metrics.py) and
    # slots reserved (step/carry.py).
    declare_resolution(server_args, "sglang_dflash", speculative_dflash_block_size=chosen.largest.depth + 1)


def _told(chosen: Options) -> str:
    """What is drafted, in words."""
    kind = "chain" if chosen.chain else "tree"
    seen = f"the last {chosen.draft_window} tokens" if chosen.draft_window else "the whole context"
    trees = [f"{s.nodes} node{'s' * (s.nodes > 1)}, {s.depth} deep" for s in chosen.shapes if s.nodes]
    if len(chosen.shapes) == 1:
        return f"{kind}s of {trees[0]}, always; a draft sees {seen}" if trees else "nothing is drafted"
    return f"{kind}s of {'; '.join(trees)}; or none, by what pays; a draft sees {seen}"


def _said_at_start(server_args: Any) -> Iterator[str]:
    """Arguments that mean another thing here than in SGLang, or nothing."""
    topk = server_args.speculative_eagle_topk
    if topk not in (None, 1):
        yield f"--speculative-eagle-topk {topk} asks for a tree, as no value does; only 1, a chain, is told apart"
    for field, (neutral, why) in WITHOUT_EFFECT.items():
        value = getattr(server_args, field)
        if value != neutral:
            yield f"{_option(server_args, field)} has no effect: {why}"


def _option(arguments: Any, field: str) -> str:
    """The option as the user types it; one that takes no value is named alone."""
    value, name = getattr(arguments, field), f"--{field.replace('_', '-')}"
    return name if value is True else f"{name} {value}"


def _check_shared_memory(chosen: Options) -> None:
    """Some GPUs have too little of it for deep lattices of many candidates, or for wide codebooks."""
    import torch

    there = torch.cuda.get_device_properties().shared_memory_per_block_optin
    largest = chosen.largest
    needed = limits.shared_memory(largest.nodes, largest.depth, chosen.top_k, chosen.draft.selector_rank)
    if needed > there:
        raise ValueError(
            f"{largest.depth} positions of {chosen.top_k} candidates with a selector of rank "
            f"{chosen.draft.selector_rank} take {needed} bytes of a GPU's shared memory, and this one has {there} a "
            "block: ask for fewer positions (--speculative-num-steps), or lower selector_top_k in the draft's "
            "config.json"
        )


def _settled_admission(server_args: Any, chosen: Options) -> dict[str, int]:
    """How many requests run at once, and when one that waits may join them, where the user does not say.

    SGLang lets DFLASH run 48, and a prompt wait until several may join. Steps that shrink with the batch need no such
    limit: as many run as there are CUDA graphs for, and each joins at once.
    """
    from sglang.srt.arg_groups.overrides import resolving_view

    view = resolving_view(server_args)
    settled = {}
    if view.min_free_slots_delay is None:
        settled["min_free_slots_delay"] = 1
    if view.max_running_requests is None and len(chosen.shapes) > 1:
        settled["max_running_requests"] = max(SGLANGS_REQUESTS, view.cuda_graph_config.decode.max_bs or 0)
    return settled


def _settled_pool(server_args: Any) -> dict[str, Any]:
    """Sliding layers keep their keys in a smaller pool beside that of full layers, whose slots the draft's context has
    too. Where all layers slide SGLang would free those slots.
    """
    target = _target(server_args)
    return {"disable_hybrid_swa_memory": True} if target.two_pools and not target.full_layers else {}


def _settled_on_cuda(server_args: Any) -> dict[str, Any]:
    """SGLang's arguments that follow from what serves window passes on CUDA; a draft follows its target's backend."""
    from sglang.srt.arg_groups.overrides import resolving_view
    from sglang.srt.model_executor.cuda_graph_config import Backend, Phase, with_phase

    view = resolving_view(server_args)
    backend = cuda.attention_backend(server_args, view.dtype)
    graphs, vision = view.cuda_graph_config, view.mm_attention_backend
    if backend == PLAIN_ATTENTION:
        vision = vision or "sdpa"  # SGLang's default for a vision tower takes 16 bits only, as for the model beside it
        for phase in Phase.ALL:  # no graph can hold this backend, which asks the device for lengths
            graphs = with_phase(graphs, phase, backend=Backend.DISABLED)
    elif backend == cuda.FAST_ATTENTION and _prefills_in_one_launch(server_args):
        requests = graphs.prefill.full_prefill_max_req or PREFILLED
        sizes = _prefill_sizes(server_args, graphs.prefill.bs)
        graphs = with_phase(
            graphs, Phase.PREFILL, backend=Backend.FULL, full_prefill_max_req=requests, bs=sizes, max_bs=max(sizes)
        )
    # A draft reads the target's features: of its own type, which "auto" would give it, it could not.
    dtype = _target(server_args).dtype if view.dtype == "auto" else view.dtype
    return {
        "attention_backend": backend, "mm_attention_backend": vision, "cuda_graph_config": graphs, "dtype": dtype,
    }  # fmt: skip


def _prefill_sizes(server_args: Any, sizes: list[int]) -> list[int]:
    """Tokens of each prefill graph, where the user names none: of SGLang's sizes those worth their capture, and one for
    a lone token, which is left of a prompt that the cache knows. (SGLang pads to twice the tokens at most.)
    """
    from sglang.srt.model_executor.cuda_graph_config import Phase

    asked = {(Phase.PREFILL, "bs"), (Phase.PREFILL, "max_bs")} & server_args._cuda_graph_config_locked
    return sizes if asked else sorted({2, *(tokens for tokens in sizes if tokens <= LONG_PREFILL)})


def _prefills_in_one_launch(server_args: Any) -> bool:
    """Whether a prompt's pass is one CUDA graph. SGLang by itself launches a graph a layer, and attention between them,
    and decoding waits for its host.

    For what has been measured, and where the user says nothing else: plain attention in 16 bits on one GPU, prompts
    apart from decoding requests, of whom one graph could not hold enough.
    """
    from sglang.srt.arg_groups.overrides import resolving_view
    from sglang.srt.model_executor.cuda_graph_config import Backend, Phase

    view, target = resolving_view(server_args), _target(server_args)
    if (Phase.PREFILL, "backend") in server_args._cuda_graph_config_locked or view.enable_mixed_chunk:
        return False
    usual = view.cuda_graph_config.prefill.backend == Backend.BREAKABLE
    return bool(usual and not (target.needs or target.quantization or view.enable_lora or view.tp_size > 1))


def _check_attention(server_args: Any) -> None:
    """A backend that reads no window mask would let tree nodes see their siblings: wrong text, without a word."""
    from sglang.srt.arg_groups.overrides import resolving_view

    view = resolving_view(server_args)
    if asked := other_attention(view, PLAIN_ATTENTION):
        raise ValueError(
            f"{asked} (page size {view.page_size}) cannot read a tree: on a CPU DFLASH needs {PLAIN_ATTENTION}, "
            "with any page size; leave the option out"
        )


def _check_draft(server_args: Any, chosen: Options) -> None:
    target, draft = _target(server_args), chosen.draft
    draft.check(
        hidden_size=target.hidden_size, vocab_size=target.vocab_size, num_layers=target.num_layers
    )
    _check_shares(server_args, draft)
    checkpoint = _draft_checkpoint(server_args)
    overrides = server_args.json_model_override_args
    changed = "" if overrides == "{}" else f", changed by --json-model-override-args {overrides}"
    if shapes := checkpoint.tensor_shapes():
        check_tensors(shapes, draft, source=checkpoint.path + changed)
    if chosen.mask_embedding is not None:
        load_mask_embedding(chosen.mask_embedding, draft)


def _check_shares(server_args: Any, draft: DraftConfig) -> None:
    """Tensor parallelism gives each rank as many heads and columns of the draft as any other."""
    from sglang.srt.arg_groups.overrides import resolving_view

    ranks = resolving_view(server_args).tp_size
    parts = {"attention heads": draft.num_heads, "key-value heads": draft.num_kv_heads,
             "MLP columns": draft.intermediate_size}  # fmt: skip
    if ranks % draft.num_kv_heads == 0:
        del parts["key-value heads"]  # of fewer heads than ranks several ranks have the same
    for what, count in parts.items():
        if count % ranks:
            raise ValueError(
                f"the draft's {count} {what} cannot be shared evenly by --tp-size {ranks}: give a size that divides "
                "them, or more replicas (--dp-size)"
            )


def reason_to_hand_over(server_args: Any) -> str:
    """Why SGLang's own DFLASH worker serves this, or nothing where ours does.

    Asked again in every process: what it reads must not change once DFLASH's arguments are settled.
    """
    return next(_reasons(server_args), "")


def _reasons(server_args: Any) -> Iterator[str]:
    from sglang.srt.platforms import current_platform

    checkpoint, draft = _draft_checkpoint(server_args), _draft_config(server_args)
    who, reason = draft.served_by(checkpoint.tensor_shapes() if not draft.unserved else ())
    if who != "ours":
        yield f"the draft has {reason}"
    yield from _reasons_in_arguments(server_args)
    target = _target(server_args)
    if target.unserved:
        yield target.unserved
    if Need.DELTA_NETS in target.needs:
        yield from _reasons_with_states(server_args)
    if current_platform.device_type == "cpu":
        if target.quantization:
            yield f"the target is quantised ({target.quantization})"
        if _lora_modules(server_args) is not None:
            yield "LoRA adapters are asked for"
        yield from cpu.BACKEND.lacks(target)
    elif current_platform.device_type != "cuda":
        yield f"trees run on CUDA and on a plain CPU, not on {current_platform.device_name!r}"
    elif reason := _reason_on_cuda(server_args, draft, target):
        yield reason


def _reasons_in_arguments(server_args: Any) -> Iterator[str]:
    from sglang.srt.arg_groups.overrides import resolving_view

    view = resolving_view(server_args)
    for size in SIZES:
        if (getattr(view, size) or 1) > 1:
            yield f"{_option(view, size)} is more than one"
    if view.disaggregation_mode != "null":
        yield f"{_option(view, 'disaggregation_mode')} sends keys and values to another server"
    if view.enable_deterministic_inference:
        yield "--enable-deterministic-inference asks for sums that do not depend on the batch"
    for flag in HANDED_OVER:
        if getattr(server_args, flag):
            yield f"{_option(server_args, flag)} is asked for"
    if server_args.speculative_draft_model_quantization not in (None, "unquant"):
        yield f"{_option(server_args, 'speculative_draft_model_quantization')} asks for a quantised draft"
    if server_args.speculative_draft_kv_cache_dtype not in (None, "auto"):
        yield f"{_option(server_args, 'speculative_draft_kv_cache_dtype')} asks for a draft cache of its own type"
    tables = sorted({"all", "embed_tokens", "lm_head"} & set(_lora_modules(server_args) or ()))
    if tables:
        yield f"LoRA adapters change the embedding or the head ({tables[0]})"


def keeps_states_on_cuda(server_args: Any) -> bool:
    """Whether the target has gated delta nets, and SGLang's kernels to run them."""
    from sglang.srt.platforms import current_platform

    return current_platform.device_type == "cuda" and Need.DELTA_NETS in _target(server_args).needs


def _reasons_with_states(server_args: Any) -> Iterator[str]:
    """A prefix cache may only keep states at points that the step is told of (SGLang's extra buffer)."""
    from sglang.srt.arg_groups.overrides import resolving_view

    view = resolving_view(server_args)
    strategy = view.mamba_radix_cache_strategy  # settled before DFLASH is
    if not view.disable_radix_cache and strategy not in ("auto", "extra_buffer"):
        yield (
            f"the target has gated delta nets, whose prefix cache is of --mamba-radix-cache-strategy {strategy}: give "
            "extra_buffer, or --disable-radix-cache"
        )
    if view.tp_size > 1:
        yield f"the target has gated delta nets, and {_option(view, 'tp_size')} is more than one"
    for flag in HANDED_OVER_WITH_STATES:
        if getattr(server_args, flag):
            yield f"the target has gated delta nets, and {_option(server_args, flag)} is asked for"


def _lora_modules(server_args: Any) -> set[str] | None:
    """Modules that LoRA adapters change, as far as options and local adapters name them; None without LoRA."""
    adapters = server_args.lora_paths or ()
    if server_args.enable_lora is False or not (server_args.enable_lora or adapters):
        return None
    modules = set(server_args.lora_target_modules or ())
    for adapter in adapters.values() if isinstance(adapters, dict) else adapters:
        path = str(adapter["lora_path"] if isinstance(adapter, dict) else getattr(adapter, "lora_path", adapter))
        file = Path(path.partition("=")[2] or path) / "adapter_config.json"
        if file.is_file():
            named = json.loads(file.read_text(encoding="utf-8")).get("target_modules") or ()
            modules |= {named} if isinstance(named, str) else set(named)
    return modules


def _reason_on_cuda(server_args: Any, draft: DraftConfig, target: Target) -> str:
    from sglang.srt.arg_groups.overrides import resolving_view
    from torch.cuda import get_device_capability

    return cuda.unserved(server_args, resolving_view(server_args), draft, target, get_device_capability())


def _draft_checkpoint(server_args: Any) -> Checkpoint:
    from sglang.srt.arg_groups.overrides import resolving_view

    view = resolving_view(server_args)
    return Checkpoint(view.speculative_draft_model_path, view.speculative_draft_model_revision, view.download_dir)


def _draft_config(server_args: Any) -> DraftConfig:
    """The draft's config as its network will be given it: SGLang's overrides are the target's and the draft's."""
    checkpoint, overrides = _draft_checkpoint(server_args), json.loads(server_args.json_model_override_args)
    folder = checkpoint.folder()
    if folder is not None and not overrides:
        return DraftConfig.load(folder)
    from sglang.srt.utils.hf_transformers_utils import get_config

    found = get_config(
        str(folder or checkpoint.path), server_args.trust_remote_code, revision=checkpoint.revision,
        model_override_args=overrides,
    )  # fmt: skip
    return DraftConfig.from_dict(found.to_dict())


def _target(server_args: Any) -> Target:
    from sglang.srt.arg_groups.overrides import model_config_of, resolving_view

    view = resolving_view(server_args)
    checkpoint = Checkpoint(view.model_path, view.revision, view.download_dir)
    return Target.of(model_config_of(server_args), checkpoint, view.kv_cache_dtype)
