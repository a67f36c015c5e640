"""Where the active coordinator is, as a standby says."""

from __future__ import annotations

from ferryline.protocol.errors import CoordinatorStandby, FerrylineError, InvalidArgument
from ferryline.transport import check_url


def hinted(error: FerrylineError) -> str:
    """URL of the active coordinator, if this refusal of a standby names it; "" otherwise."""
    active = error.details.get("active") if isinstance(error, CoordinatorStandby) else None
    try:
        return check_url(active) if isinstance(active, str) else ""
    except InvalidArgument:
        return ""
