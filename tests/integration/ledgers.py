"""What a campaign found, said and kept."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any


def tell(result: dict[str, Any], ledger: Path | None) -> None:
    """Print a result as one line of JSON, and append it to the ledger if there is one."""
    line = json.dumps(result) + "\n"
    sys.stdout.write(line)
    sys.stdout.flush()
    if ledger:
        with ledger.open("a") as out:
            out.write(line)
