"""The platform object SGLang asks for everything that depends on the device."""

from __future__ import annotations

import os
import platform as host
from collections.abc import Sequence
from typing import TYPE_CHECKING

import psutil
import torch
from sglang.srt.platforms.device_mixin import PlatformEnum
from sglang.srt.platforms.interface import KVPoolKind, PlatformCapabilities, SRTPlatform

from sglang_dflash.platforms import PLAIN_ATTENTION

if TYPE_CHECKING:
    from sglang.srt.server_args import ServerArgs

DISPATCH_KEY = "plain_cpu"

# What a laptop can hold and still be used for something else. The KV pool takes its memory on first touch, so its
# share is an upper bound, not a price.
DEFAULT_MEM_FRACTION = 0.4
DEFAULT_MAX_RUNNING_REQUESTS = 48
DEFAULT_CHUNKED_PREFILL_SIZE = 2048
OPENMP_SPINS = "20000"


class PlainCpuPlatform(SRTPlatform):
    """SGLang on any CPU that torch runs on, in plain torch and oneDNN."""

    _enum = PlatformEnum.OOT
    device_name = "cpu"
    device_type = "cpu"
    capabilities = PlatformCapabilities()

    def get_device(self, device_id: int | None = 0) -> str:
        return "cpu"

    def get_device_name(self, device_id: int = 0) -> str:
        return f"cpu ({host.machine()})"

    def get_device_uuid(self, device_id: int = 0) -> str:
        return host.machine()

    def set_device(self, device: torch.device) -> None:
        torch.cpu.set_device(device)

    def get_device_total_memory(self, device_id: int = 0) -> int:
        return int(psutil.virtual_memory().total)

    def get_current_memory_usage(self, device: torch.device | None = None) -> float:
        memory = psutil.virtual_memory()
        return float(memory.total - memory.available)

    def get_available_memory(self, device_id: int = 0) -> tuple[int, int]:
        memory = psutil.virtual_memory()
        return memory.available, memory.total

    def get_torch_profiler_activity_str(self) -> str:
        return "CPU"

    def get_torch_profiler_activity(self) -> torch.profiler.ProfilerActivity:
        return torch.profiler.ProfilerActivity.CPU

    def get_dispatch_key_name(self) -> str:
        return DISPATCH_KEY

    def get_compile_backend(self, mode: str | None = None) -> str:
        return "eager"

    def apply_server_args_defaults(self, server_args: ServerArgs) -> None:
        # "intel_amx" is what SGLang fills in for any CPU; it needs the kernels of its own CPU engine.
        if server_args.attention_backend in (None, "intel_amx"):
            server_args.attention_backend = PLAIN_ATTENTION
        if server_args.dtype == "auto":
            server_args.dtype = "float32"
        if server_args.dtype in ("float32", "float"):  # of layers with a state what they keep is of 16 bits by default
            os.environ.setdefault("SGLANG_MAMBA_CONV_DTYPE", "float32")
        if server_args.mem_fraction_static is None:
            server_args.mem_fraction_static = DEFAULT_MEM_FRACTION
        if server_args.max_running_requests is None:
            server_args.max_running_requests = DEFAULT_MAX_RUNNING_REQUESTS
        if server_args.chunked_prefill_size is None:
            server_args.chunked_prefill_size = DEFAULT_CHUNKED_PREFILL_SIZE
        # The scheduler shares the cores with the tokenizer and the client, so who waits must sleep. By default
        # an OpenMP thread spins for long before it does: a step takes ten times as long as soon as another
        # process wants its core. Spinning just longer than from one product to the next costs nothing where
        # the cores are free. The scheduler inherits the setting.
        server_args.sleep_on_idle = True
        if not os.environ.keys() & {"GOMP_SPINCOUNT", "OMP_WAIT_POLICY"}:
            os.environ["GOMP_SPINCOUNT"] = OPENMP_SPINS
        if (ranks := server_args.tp_size * server_args.dp_size) > 1:  # SGLang deals out NUMA nodes, and few have two
            os.environ.setdefault("SGLANG_CPU_OMP_THREADS_BIND", cores_of_ranks(sorted(os.sched_getaffinity(0)), ranks))

    def get_default_attention_backend(self) -> str:
        return PLAIN_ATTENTION

    def get_default_speculative_draft_attention_backend(self, algorithm: str) -> str:
        return PLAIN_ATTENTION

    def supports_speculative_algorithm(self, algorithm: str) -> bool:
        return algorithm == "DFLASH"

    def supports_speculative_draft_attention_backend(self, algorithm: str, backend: str) -> bool:
        return backend == PLAIN_ATTENTION

    def get_kv_pool_cls(self, *, kind: KVPoolKind) -> type | None:
        if kind != "mha":
            return None
        from sglang_dflash.platforms.cpu.memory import CpuKVPool

        return CpuKVPool

    def support_mamba_cache_extra_buffer(self) -> bool:
        return True

    def init_backend(self) -> None:
        from sglang_dflash.platforms.cpu import vector_math
        from sglang_dflash.platforms.cpu.rope import register_rope

        vector_math.settle()
        register_rope(self.get_dispatch_key_name())

    def post_load_model(self, model: torch.nn.Module) -> None:
        from sglang_dflash.platforms.cpu.linear import pack_linear_layers

        pack_linear_layers(model)


def cores_of_ranks(cores: Sequence[int], ranks: int) -> str:
    """Each rank's share of the cores, as SGLang reads them: numbers, "|" between ranks; one each of few."""
    share = max(len(cores) // ranks, 1)
    return "|".join(
        ",".join(str(cores[(rank * share + i) % len(cores)]) for i in range(share)) for rank in range(ranks)
    )
