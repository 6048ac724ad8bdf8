"""What SGLang's users get with this package installed who do not ask for DFLASH, or have another SGLang."""

from __future__ import annotations

import pickle
import subprocess
import sys
import tomllib
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from sglang.srt.managers import multi_tokenizer_mixin
from sglang.srt.plugins.hook_registry import HookRegistry

import sglang_dflash
from sglang_dflash import arguments, plugin
from sglang_dflash.platforms import cpu

LIMIT = 0.1  # seconds of a start that this package may take where nobody asks for it

COST = """
import time
import sglang.srt.entrypoints.http_server  # what every server imports
started = time.perf_counter()
from sglang_dflash import plugin
from sglang_dflash.platforms import cpu
cpu.activate()
plugin.register()
print(time.perf_counter() - started)
"""

LIGHT = """
import sys
import sglang.launch_server
had = set(sys.modules)
from sglang_dflash import plugin
from sglang_dflash.platforms import cpu
cpu.activate()
plugin.register()
print(*sorted(set(sys.modules) - had))
"""


TOKENIZER_WORKER = """
import pickle, sys
from types import SimpleNamespace
from sglang.srt.managers.multi_tokenizer_mixin import TokenizerWorker
from sglang.srt.runtime_context import get_context
_, _, info = pickle.loads(bytes.fromhex(sys.argv[1]))  # as SGLang begins in such a process, from shared memory
told = SimpleNamespace(
    spec_verify_ct=[10], spec_num_correct_drafts=[30], completion_tokens=[40], spec_correct_drafts_histogram=[]
)
meta = {}
with get_context().override_server_args(
    speculative_algorithm="DFLASH", speculative_num_draft_tokens=32, speculative_dflash_block_size=7
):
    TokenizerWorker._calculate_spec_decoding_metrics(None, meta, told, 0)
print(type(info).__name__, info["max_req_input_len"], meta["spec_num_proposed_drafts"])
"""


def run(script: str, *args: str) -> str:
    ran = subprocess.run([sys.executable, "-c", script, *args], capture_output=True, text=True, timeout=300, check=True)
    return ran.stdout.splitlines()[-1]


@pytest.fixture
def registry(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """The targets that hooks are registered on; nothing is patched."""
    targets: list[str] = []
    monkeypatch.setattr(HookRegistry, "register", lambda target, *_, **__: targets.append(target))
    yield targets


def test_the_entry_points_take_no_time() -> None:
    assert float(run(COST)) < LIMIT


def test_the_entry_points_import_nothing_of_sglang_that_it_may_not_need() -> None:
    """A command that only prints its help would wait for it."""
    imported = run(LIGHT).split()
    assert [name for name in imported if not name.startswith("sglang_dflash")] == []


def test_the_release_that_is_hooked_is_the_one_asked_for() -> None:
    project = tomllib.loads((Path(__file__).parents[1] / "pyproject.toml").read_text())["project"]
    assert f"sglang=={sglang_dflash.SGLANG}" in project["dependencies"]
    assert sglang_dflash.other_sglang() == ""


def test_another_sglang_is_left_alone(
    registry: list[str], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr("sglang_dflash.metadata.version", lambda name: "0.5.24")
    monkeypatch.setattr(plugin, "add_plain_attention", lambda: registry.append("attention"))
    plugin.register()
    assert registry == [] and cpu.activate() is None
    assert "made for SGLang 0.5.23 and changes nothing in this one, 0.5.24" in caplog.text


def test_this_sglang_is_hooked(registry: list[str]) -> None:
    plugin.register()
    assert {target.rpartition(".")[2] for target in registry} >= {"resolve_once", "_handle_dflash", "create_worker"}


def test_accept_rates_of_tokenizer_workers_are_over_the_positions_of_a_path_too(registry: list[str]) -> None:
    """They are processes without plug-ins (--tokenizer-worker-num), and read what the first one has written."""
    plugin.take_over_requests.__wrapped__()
    assert f"{multi_tokenizer_mixin.__name__}.write_data_for_multi_tokenizer" in registry
    given, _ = plugin._tell_tokenizer_workers("ports", "arguments", {"max_req_input_len": 500})
    assert run(TOKENIZER_WORKER, pickle.dumps(given).hex()) == "dict 500 60"  # ten steps of six positions


@pytest.mark.parametrize(("architecture", "has_delta_nets"), [("Llama", True), ("Llama", False), ("GptOss", False)])
def test_layers_are_in_plain_torch_where_a_model_has_some_that_sglang_has_kernels_for_alone(
    registry: list[str], monkeypatch: pytest.MonkeyPatch, architecture: str, has_delta_nets: bool
) -> None:
    config = SimpleNamespace(architectures=[f"{architecture}ForCausalLM"])
    found = config if has_delta_nets else None
    monkeypatch.setattr("sglang.srt.configs.hybrid_arch.hybrid_gdn_config", lambda _: found)
    plugin._serve_layers(SimpleNamespace(model_config=SimpleNamespace(hf_config=config)), "attention")
    assert any(target.endswith(".GDNAttnBackend") for target in registry) == has_delta_nets
    assert any("swiglu" in target for target in registry) == (architecture == "GptOss")


@pytest.mark.parametrize("algorithm", ["EAGLE", "NGRAM", "STANDALONE"])
def test_another_algorithm_gets_sglangs_worker(algorithm: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def never(*_: Any) -> str:
        raise AssertionError("DFLASH was not asked for")

    monkeypatch.setattr(arguments, "reason_to_hand_over", never)
    monkeypatch.setattr(plugin, "_take_over", never)
    given: list[Any] = []
    original: Callable[..., str] = lambda *args: (given.extend(args), "sglang's")[1]  # noqa: E731
    other, args = SimpleNamespace(name=algorithm, is_dflash=lambda: False), object()
    assert plugin._create_worker(original, other, args) == "sglang's"
    assert given == [other, args]


def test_arguments_of_another_algorithm_are_left_alone() -> None:
    args = SimpleNamespace(
        model_path="some/model", speculative_algorithm="EAGLE", speculative_draft_model_path="some/draft"
    )
    before = dict(vars(args))
    plugin._before_resolving(args)
    assert vars(args) == before
