"""The `sglang-dflash` command: one file a subcommand."""

from __future__ import annotations

import sys

import typer
from rich.console import Console

from sglang_dflash.cli import bench, demo, doctor, embedded, explain, watch
from sglang_dflash.cli.server import ServerError
from sglang_dflash.embedded.cache import CacheError
from sglang_dflash.embedded.weights import DownloadError

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_show_locals=False,
    rich_markup_mode="markdown",
    help="DFLASH speculative decoding with lattice trees, for SGLang. "
    "To serve, start SGLang as ever: `python -m sglang.launch_server --speculative-algorithm DFLASH …`",
)
app.command()(demo.demo)
app.command()(explain.explain)
app.command()(watch.watch)
# Options that bench does not know are SGLang's, for the servers it starts.
app.command(context_settings={"allow_extra_args": True, "ignore_unknown_options": True})(bench.bench)
app.command()(doctor.doctor)
app.command()(embedded.embedded)


def main() -> None:
    """The console script: what a server, the cache or a download failed with is shown, not a traceback of ours."""
    try:
        app(prog_name="sglang-dflash")
    except (ServerError, CacheError, DownloadError) as error:
        Console(stderr=True).print(str(error), markup=False, highlight=False, soft_wrap=True)
        sys.exit(1)
