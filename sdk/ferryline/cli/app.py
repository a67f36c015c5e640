"""The root of the command line: global options, and one module per noun that is imported only when it is named.

`ferryline --help` must be quick, so the other nouns stand in the list as placeholders. Global options (``--url``,
``--output`` and so on) may stand anywhere on the line: `hoist` moves them in front of the noun before parsing.
"""

from __future__ import annotations

import importlib
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, NoReturn

import typer

from ferryline.cli import failures
from ferryline.cli.invocation import Invocation
from ferryline.cli.settings import UsageError

if TYPE_CHECKING:
    from ferryline.protocol.errors import FerrylineError

LOCAL, DATA, CLUSTER, ACCESS, TOOLS = "This machine", "Records", "Cluster", "Access", "Tools"
# name -> (module below ferryline.cli, panel of --help, one line)
COMMANDS: dict[str, tuple[str, str, str]] = {
    "up": ("up", LOCAL, "Start a coordinator and brokers here, over TLS."),
    "demo": ("demo", LOCAL, "Kill a broker under load and count what was lost: nothing."),
    "falconq": ("falconq", LOCAL, "Serve FalconQ's HTTP here, in front of a cluster."),
    "topic": ("topic", CLUSTER, "Create, list, describe, alter and delete topics."),
    "exchange": ("exchange", CLUSTER, "Create, list, show and delete exchanges; test where records go."),
    "binding": ("binding", CLUSTER, "Bind topics to exchanges, by routing key or headers."),
    "queue": ("queue", CLUSTER, "Look at queue groups; pause, redrive, purge and delete them."),
    "dlq": ("dlq", CLUSTER, "Dead letters: list them, and send them back."),
    "group": ("group", CLUSTER, "Look at consumer groups and their lag; seek; delete."),
    "broker": ("broker", CLUSTER, "List brokers; drain one for maintenance."),
    "cluster": ("cluster", CLUSTER, "Health, partitions and in-sync sets."),
    "principal": ("principal", ACCESS, "Who may use the cluster, and for what."),
    "token": ("token", ACCESS, "API keys of principals: made, listed, rotated, revoked."),
    "audit": ("audit", ACCESS, "Who changed what, and who was refused."),
    "produce": ("produce", DATA, "Send lines, files or JSON as records."),
    "consume": ("consume", DATA, "Print records, from any offset or time."),
    "explain": ("explain", DATA, "Say where one record is, and why it is not delivered."),
    "worker": ("worker", DATA, "Run the subscribers, tasks and schedules of an app."),
    "definitions": ("definitions", CLUSTER, "Topics, exchanges and principals as one file."),
    "backup": ("backup", TOOLS, "Take backups of a running cluster, and check them."),
    "restore": ("restore", TOOLS, "Put a backup into an empty cluster."),
    "verify": ("verify", TOOLS, "Prove that no copy is damaged, different or incomplete."),
    "bench": ("bench", TOOLS, "Measure throughput and latency."),
    "chaos": ("chaos", TOOLS, "Break a cluster under load and prove that nothing was lost."),
    "doctor": ("doctor", TOOLS, "Say what is wrong and what to do about it."),
    "certs": ("certs", TOOLS, "Show certificates and when they expire; change them."),
    "context": ("context", TOOLS, "Name clusters in the config file and switch between them."),
    "login": ("login", TOOLS, "Log in at a cluster, with a browser."),
    "logout": ("logout", TOOLS, "Forget that login."),
    "whoami": ("whoami", TOOLS, "Say who you are for the cluster, and what you may do."),
}
_WITH_VALUE = {"--url", "--ca", "--token", "--context", "--config", "--timeout", "--output", "-o"}
_FLAGS = {"--verbose", "--print-config"}

_HELP = """
Ferryline: keyed messages in order, on replicated logs, over HTTPS.

  ferryline up                                  a cluster on this machine\n
  ferryline topic create orders -p 12\n
  echo 'c1 hello' | ferryline produce orders -f '%k %v\\n'\n
  ferryline consume orders --from start --count 1\n
  ferryline doctor                              when something does not work\n

Settings come from ~/.config/ferryline/config.toml, then FERRYLINE_* variables, then flags; the options below may stand
anywhere on the line. Exit status: 0 done, 1 failed, 2 wrong usage, 3 not found, 4 denied, 5 unavailable.
"""


def _version(asked: bool) -> None:
    if asked:
        from importlib.metadata import PackageNotFoundError, version

        try:
            number = version("ferryline")
        except PackageNotFoundError:  # run from a source tree
            number = "0 (source tree)"
        typer.echo(f"ferryline {number}")
        raise typer.Exit


def _root(
    ctx: typer.Context,
    url: Annotated[str | None, typer.Option(help="Coordinators or brokers, comma separated.", metavar="URLS")] = None,
    ca: Annotated[str | None, typer.Option(help="CA certificate of the cluster.", metavar="FILE")] = None,
    token: Annotated[str | None, typer.Option(help="Access token; better given as FERRYLINE_TOKEN.")] = None,
    context: Annotated[str | None, typer.Option(help="A named cluster of the config file.")] = None,
    config: Annotated[Path | None, typer.Option(help="Another config file.", metavar="FILE")] = None,
    timeout: Annotated[float | None, typer.Option(help="Seconds that one request may take.")] = None,
    output: Annotated[str | None, typer.Option("--output", "-o", help="table, json, yaml or ndjson.")] = None,
    verbose: Annotated[bool, typer.Option("--verbose", help="Log what the client does; tracebacks.")] = False,
    print_config: Annotated[bool, typer.Option("--print-config", help="Show settings and their sources.")] = False,
    version: Annotated[bool, typer.Option("--version", callback=_version, is_eager=True, help="Show it.")] = False,
) -> None:
    flags = {"url": url, "ca": ca, "token": token, "timeout": timeout, "output": output, "verbose": verbose}
    invocation = Invocation(flags, context, config)
    ctx.obj = invocation
    if verbose:
        import logging

        logging.basicConfig(level=logging.DEBUG, stream=sys.stderr, format="%(levelname)s %(name)s: %(message)s")
    if print_config:
        shown = invocation.settings.shown()
        if invocation.output.for_people:
            invocation.output.rows(
                ({"setting": name, "value": item["value"], "from": item["from"]} for name, item in shown.items()),
                title=f"config file: {invocation.settings.file}",
            )
        else:
            invocation.output.one({**shown, "file": str(invocation.settings.file)})
        raise typer.Exit
    if ctx.invoked_subcommand is None:
        typer.echo(ctx.get_help())
        raise typer.Exit


def hoist(argv: Sequence[str]) -> tuple[list[str], str]:
    """Global options first, the rest in its order; and the noun, "" if there is none.

    Nothing after ``--`` is touched.
    """
    front: list[str] = []
    rest: list[str] = []
    items = list(argv)
    while items:
        item = items.pop(0)
        name, joined, _ = item.partition("=")
        if item == "--":
            rest += [item, *items]
            break
        if item in _FLAGS or (joined and name in _WITH_VALUE):
            front.append(item)
        elif item in _WITH_VALUE:
            front += [item, *items[:1]]
            del items[:1]
        else:
            rest.append(item)
    noun = next((item for item in rest if not item.startswith("-")), "")
    return front + rest, noun


def build(noun: str) -> typer.Typer:
    """The program, with ``noun`` loaded and placeholders for the others; "*" loads all."""
    app = typer.Typer(
        name="ferryline",
        help=_HELP,
        invoke_without_command=True,
        rich_markup_mode="rich",
        pretty_exceptions_enable=False,
        context_settings={"help_option_names": ["-h", "--help"]},
    )
    app.callback()(_root)
    for name, (module, panel, line) in COMMANDS.items():
        if noun not in (name, "*"):
            app.command(name, help=line, rich_help_panel=panel)(_placeholder)
            continue
        loaded = importlib.import_module(f"ferryline.cli.{module}")
        if isinstance(loaded.app, typer.Typer):
            app.add_typer(loaded.app, name=name, rich_help_panel=panel)
        else:
            app.command(name, rich_help_panel=panel)(loaded.app)
    return app


def _placeholder() -> None:
    raise AssertionError("only the named noun is ever run")


def run(argv: Sequence[str] | None = None) -> NoReturn:
    """Run one command line and end the process with its status."""
    args, noun = hoist(sys.argv[1:] if argv is None else argv)
    completing = any(name.endswith("_COMPLETE") and name.startswith("_") for name in os.environ)
    try:
        build("*" if completing else noun)(args=args, prog_name="ferryline")
    except UsageError as error:
        _end(f"ferryline: {error}", failures.USAGE)
    except failures.Failed as error:
        text = f"{error.code}: {error}" if error.code else str(error)
        _end(f"{text}\n{error.remedy}".strip(), error.status)
    except BrokenPipeError:  # `ferryline consume | head`: the reader has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(failures.OK)
    except Exception as error:
        if "--verbose" in args:
            raise
        _end_with(error, args)
    sys.exit(failures.OK)


def _end_with(error: Exception, args: Sequence[str]) -> NoReturn:
    from ferryline.protocol.errors import FerrylineError

    if isinstance(error, FerrylineError):
        _end(_text_of(error, args), failures.exit_status(error))
    from ferryline.cli.processes import ProcessFailed

    if isinstance(error, ProcessFailed):
        _end(f"ferryline: {error}", failures.FAILED)
    if isinstance(error, OSError) and error.filename:
        _end(f"ferryline: {error.filename}: {error.strerror}", failures.FAILED)
    raise error


def _text_of(error: FerrylineError, args: Sequence[str]) -> str:
    structured = {"json", "ndjson", "--output=json", "--output=ndjson"}
    if structured & set(args):
        import json

        return json.dumps({"error": failures.describe(error)}, default=str)
    return f"{error}\n  {error.remedy}" if error.remedy else str(error)


def _end(text: str, status: int) -> NoReturn:
    sys.stderr.write(text.rstrip() + "\n")
    sys.exit(status)
