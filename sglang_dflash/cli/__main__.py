"""`python -m sglang_dflash.cli`, for where the console script is not on the path."""

from __future__ import annotations

from sglang_dflash.cli import main

main()
