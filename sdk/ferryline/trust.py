"""Whom a client trusts: the CA file as it is now, so that a CA can be changed under clients that go on running."""

from __future__ import annotations

import os
import ssl

from ferryline.protocol.errors import InvalidArgument


def ssl_context(ca: str | None) -> ssl.SSLContext:
    """TLS 1.3 with verification of chain and host name. Raises InvalidArgument when the CA cannot be read."""
    try:
        context = ssl.create_default_context(cafile=ca)
    except (OSError, ssl.SSLError) as error:
        raise InvalidArgument(f"ca: {ca!r} is not a readable PEM certificate: {error}", field="ca") from None
    context.minimum_version = ssl.TLSVersion.TLSv1_3
    return context


class Trust:
    """One context for all connections of a client. ``ca``: path of the CA file; None: what the system trusts.

    `refresh` takes in what has been added to the file. What was taken out of it is trusted until the client ends: the
    servers do not show it any more.
    """

    def __init__(self, ca: str | None) -> None:
        self.context = ssl_context(ca)
        self._ca = ca
        self._seen = self._stamp()

    def refresh(self) -> None:
        """Cheap; called before each new connection. A file that is missing or half written changes nothing."""
        stamp = self._stamp()
        if stamp is None or stamp == self._seen:
            return
        try:
            self.context.load_verify_locations(self._ca)
        except (OSError, ssl.SSLError):
            return  # being written; the next connection looks again
        self._seen = stamp

    def _stamp(self) -> tuple[int, int, int] | None:
        if self._ca is None:
            return None
        try:
            found = os.stat(self._ca)
        except OSError:
            return None
        return found.st_mtime_ns, found.st_size, found.st_ino
