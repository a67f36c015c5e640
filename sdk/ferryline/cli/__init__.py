"""The command line: `ferryline <noun> <verb>`. See `app` for how it is put together."""

from __future__ import annotations


def main() -> None:
    """Entry point of the `ferryline` program. Ends the process with the command's exit status."""
    from ferryline.cli.app import run

    run()
