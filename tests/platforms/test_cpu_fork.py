"""Server processes are forked where torch works in a fork, and spawned where it would hang."""

from __future__ import annotations

import subprocess
import sys

import pytest

SCRIPT = """
import multiprocessing
import torch
from sglang_dflash.platforms.cpu.hooks import fork_processes

multiprocessing.set_start_method("spawn")
torch.set_num_threads(2)
if {used}:
    torch.ones(1 << 20).sum()
fork_processes(None, None)
print(multiprocessing.get_start_method())
"""


@pytest.mark.parametrize(("used", "method"), [(False, "fork"), (True, "spawn")])
def test_a_process_is_forked_only_where_openmp_survives_it(used: bool, method: str) -> None:
    script = [sys.executable, "-c", SCRIPT.format(used=used)]
    ran = subprocess.run(script, capture_output=True, text=True, timeout=120, check=True)
    assert ran.stdout.split()[-1] == method
