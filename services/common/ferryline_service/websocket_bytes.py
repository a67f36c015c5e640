"""WebSocket frames of a server as bytes: unmasked, binary, whole (RFC 6455, section 5.2)."""

from __future__ import annotations

import struct

Buffer = bytes | bytearray | memoryview
JOIN_BYTES_MAX = 64 * 1024  # copying less than this is cheaper than a TLS record of its own

_SHORT = struct.Struct("!BB").pack
_MEDIUM = struct.Struct("!BBH").pack
_LONG = struct.Struct("!BBQ").pack
_BINARY = 0x82  # FIN + binary


def websocket_prefix(size: int) -> bytes:
    """Head of an unmasked binary WebSocket frame that carries ``size`` bytes."""
    if size < 126:
        return _SHORT(_BINARY, size)
    if size < 65536:
        return _MEDIUM(_BINARY, 126, size)
    return _LONG(_BINARY, 127, size)


def coalesced(buffers: list[Buffer]) -> list[Buffer]:
    """Join runs of small buffers and leave large ones as they are: each element becomes a TLS write of its own."""
    joined: list[Buffer] = []
    run: list[Buffer] = []
    size = 0
    for buffer in buffers:
        if len(buffer) > JOIN_BYTES_MAX // 4:
            if run:
                joined.append(b"".join(run))
                run, size = [], 0
            joined.append(buffer)
            continue
        run.append(buffer)
        size += len(buffer)
        if size > JOIN_BYTES_MAX:
            joined.append(b"".join(run))
            run, size = [], 0
    if run:
        joined.append(b"".join(run))
    return joined
