"""The `sglang-dflash` command: one file a subcommand."""

from __future__ import annotations

import typer

from sglang_dflash.cli.bench import bench
from sglang_dflash.cli.demo import demo
from sglang_dflash.cli.doctor import doctor
from sglang_dflash.cli.embedded import embedded

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_show_locals=False,
    rich_markup_mode="markdown",
    help="DFLASH speculative decoding with lattice trees, for SGLang. "
    "To serve, start SGLang as ever: `python -m sglang.launch_server --speculative-algorithm DFLASH …`",
)
app.command()(demo)
# Options that bench does not know are SGLang's, for the servers it starts.
app.command(context_settings={"allow_extra_args": True, "ignore_unknown_options": True})(bench)
app.command()(doctor)
app.command()(embedded)
