"""The first key of a cluster with access on: a principal `admin` that may do everything, made once.

Without it nobody could make a principal over REST. Its key lies in a file for the owner's eyes only; whoever can write
there could also change the access file. The file is written before the key counts, so that a crash leaves either no
key at all or one that the next start takes; and where the file is there beforehand, its key is taken.
"""

from __future__ import annotations

import errno
import secrets
import time
from pathlib import Path

from ferryline.protocol.access import CLUSTER, EXCHANGE, GROUP, MANAGE, TOPIC, Grant, KeyMeta
from ferryline.protocol.errors import BadCredentials
from ferryline_coordinator.core import events as ev
from ferryline_coordinator.driver import Driver
from ferryline_coordinator.rest import durable_state
from ferryline_service.access.keys import ID_BYTES, SECRET_BYTES, digest, make_key, split_key
from ferryline_service.files import write_durably
from ferryline_service.logs import get_logger

ADMIN = "admin"
EVERYTHING = tuple(Grant(resource, "*", (MANAGE,)) for resource in (TOPIC, GROUP, EXCHANGE, CLUSTER))
_log = get_logger()


async def bootstrap_admin(driver: Driver, path: Path) -> bool:
    """Make `admin` with the key in ``path``, if there is no principal yet. Returns whether that was so.

    Raises FerrylineError or OSError; asked again, it goes on where it ended.
    """
    principals = (await durable_state(driver)).principals
    known = principals.get(ADMIN)
    begun = known is not None and len(principals) == 1 and not known.keys and known.grants == EVERYTHING
    if driver.access is None or (principals and not begun):
        return False
    if any(principal.name == ADMIN for principal in driver.access.principals):
        return False  # the access file says itself who this is
    key_id, digested = _key_in(path)
    if known is None:
        comment = "made at the first start"
        await driver.ask(lambda reply: ev.PrincipalCreated(reply, ADMIN, EVERYTHING, comment=comment))
    meta = KeyMeta(key_id, digested, time.time_ns() // 1_000_000)
    await driver.ask(lambda reply: ev.KeyAdded(reply, ADMIN, meta))
    _log.info("first principal made", principal=ADMIN, key=key_id, key_in=str(path))
    return True


def _key_in(path: Path) -> tuple[str, bytes]:
    """(id, digest) of the key in a file, which is written if it is not there. Raises OSError."""
    try:
        text = path.read_text(encoding="ascii", errors="replace").strip()
    except FileNotFoundError:
        key, key_id, digested = make_key(secrets.token_bytes(ID_BYTES + SECRET_BYTES))
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        write_durably(path, f"{key}\n".encode(), mode=0o600)
        return key_id, digested
    try:
        key_id, secret = split_key(text)
    except BadCredentials as error:
        raise OSError(errno.EINVAL, error.message, str(path)) from None
    return key_id, digest(secret)
