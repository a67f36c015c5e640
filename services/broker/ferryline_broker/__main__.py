"""``python -m ferryline_broker``: flags, settings, one broker."""

from __future__ import annotations

import argparse
import asyncio
import sys
import tomllib
from pathlib import Path
from typing import Any

import pydantic

from ferryline.protocol.errors import FerrylineError
from ferryline_broker.app import EXIT_FAILED, run_broker
from ferryline_broker.config import ENV_PREFIX, BrokerConfig, as_toml, load_config
from ferryline_service.logs import get_logger, setup_logs
from ferryline_service.programs import run

EXIT_USAGE = 2
_REPEATED = ("coordinator", "tls_names")
_log = get_logger()


def parser() -> argparse.ArgumentParser:
    """One flag for each setting, beside --config and --print-config."""
    made = argparse.ArgumentParser(
        prog="ferryline-broker",
        description="A Ferryline broker. Settings: file < environment < flags.",
        epilog=f"Environment: {ENV_PREFIX}<SETTING>, for example {ENV_PREFIX}DATA_ROOT.",
        allow_abbrev=False,
    )
    made.add_argument("--config", type=Path, help="TOML file with settings")
    made.add_argument("--print-config", action="store_true", help="print the effective settings as TOML and exit")
    for name, field in BrokerConfig.model_fields.items():
        flag = "--" + name.replace("_", "-")
        action = "append" if name in _REPEATED else "store"
        made.add_argument(flag, dest=name, action=action, default=None, help=field.description, metavar="VALUE")
    return made


def main(argv: list[str] | None = None) -> int:
    """Run a broker until it is stopped. Returns the exit status: 0, 1 failed, 2 wrong settings."""
    given = vars(parser().parse_args(argv))
    toml_file, show = given.pop("config"), given.pop("print_config")
    flags: dict[str, Any] = {name: value for name, value in given.items() if value is not None}
    try:
        config = load_config(flags, toml_file)
    except pydantic.ValidationError as error:
        for problem in error.errors(include_url=False):
            name = ".".join(str(part) for part in problem["loc"]) or "settings"
            sys.stderr.write(f"ferryline-broker: {name}: {problem['msg']}\n")
        return EXIT_USAGE
    except (OSError, tomllib.TOMLDecodeError) as error:
        sys.stderr.write(f"ferryline-broker: {toml_file}: {error}\n")
        return EXIT_USAGE
    if show:
        sys.stdout.write(as_toml(config.shown()))
        return 0
    setup_logs("broker", level=config.log_level, form=config.log_form)
    _log.info("settings", **config.shown())

    async def broker(stop: asyncio.Event) -> int:
        return await run_broker(config, stop)

    try:
        return run(broker)
    except (OSError, ValueError, FerrylineError) as error:
        _log.critical("the broker cannot run", error=str(error))
        return EXIT_FAILED


if __name__ == "__main__":
    sys.exit(main())
