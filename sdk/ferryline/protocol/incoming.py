"""Where the bytes of a session go as they arrive: those of a large frame straight into the buffer it is used from.

Sessions carry little else than plain binary messages: one WebSocket frame each, unmasked, or under the mask of zeros
that our own clients use. `Incoming` takes these out of the stream and leaves everything else to a complete reader: a
control frame goes to it whole, and from the first text, fragmented, oversized, really masked or malformed frame on it
gets every byte, so that its rules, refusals and close codes are the only ones.

    room = incoming.room()          # put the next bytes here ...
    incoming.arrived(count)         # ... and say how many: ``message`` and ``other`` are called, in order
"""

from __future__ import annotations

import struct
from collections.abc import Callable

SCRATCH_BYTES = 260 * 1024  # a little over what a TLS layer hands over at once
_CLAIM_BYTES = 16 * 1024  # of memory for a stranger's frame, or twice what has come: its size is only claimed
_BINARY = 0x82  # FIN + binary, nothing reserved
_CONTROL = (0x88, 0x89, 0x8A)  # FIN + close, ping, pong
_CONTROL_BYTES_MAX = 125
_MASKED = 0x80
_NO_MASK = bytes(4)
_size_16 = struct.Struct("!H").unpack_from
_size_64 = struct.Struct("!Q").unpack_from


class Incoming:
    """One direction of one session. ``message`` gets every plain binary message, ``other`` all remaining bytes.

    ``scratch`` is shared by the sessions of a loop: what is put into it is split up before the next one reads. With
    ``trusted`` a frame gets its memory at once, otherwise as its bytes come. Callbacks must not raise.
    """

    __slots__ = (
        "_claimed",
        "_filled",
        "_held",
        "_large",
        "_left",
        "_mask",
        "_message",
        "_other",
        "_scratch",
        "_size_max",
        "_trusted",
    )

    def __init__(
        self,
        scratch: memoryview,
        message: Callable[[bytes | bytearray], None],
        other: Callable[[bytes], None],
        *,
        size_max: int,
        masked: bool,
        trusted: bool,
    ) -> None:
        self._scratch = scratch
        self._message = message
        self._other = other
        self._size_max = size_max
        self._mask = _MASKED if masked else 0
        self._trusted = trusted
        self._held = b""  # the beginning of a frame that is too short to be told
        self._large: bytearray | None = None  # a message that is not complete yet
        self._filled = self._claimed = 0  # bytes of it that are there, and its size
        self._left = False

    def leave(self) -> None:
        """All bytes are for ``other``, until `enter`."""
        self._left = True

    def enter(self) -> None:
        """The next byte begins a frame."""
        self._left = False

    def room(self) -> memoryview:
        """Where the next bytes are to be put. Good until the next call."""
        large = self._large
        if large is None:
            held = self._held
            self._scratch[: len(held)] = held
            return self._scratch[len(held) :]
        if self._filled == len(large):
            grown = bytearray(min(self._claimed, 2 * self._filled))  # a new one: the loop may hold on to the last room
            grown[: self._filled] = large
            self._large = large = grown
        return memoryview(large)[self._filled :]

    def arrived(self, count: int) -> None:
        """``count`` bytes are where `room` said."""
        large = self._large
        if large is None:
            end = len(self._held) + count
            self._held = b""
            self._split(self._scratch[:end])
            return
        self._filled += count
        if self._filled == self._claimed:
            self._large = None
            self._message(large)

    def _split(self, data: memoryview) -> None:
        at, end = 0, len(data)
        while at < end:
            taken = 0 if self._left else self._take(data[at:])
            if not taken:
                break
            at += taken
        if at < end:
            if self._left:
                self._other(bytes(data[at:]))
            else:
                self._held = bytes(data[at:])

    def _take(self, data: memoryview) -> int:
        """Take a frame, or the beginning of a large one. Returns its length; 0: too little is there, or not for us."""
        there = len(data)
        if there < 2:
            return 0
        first, size, head = data[0], data[1] & ~_MASKED, 2
        plain = first == _BINARY
        if data[1] & _MASKED != self._mask or not (plain or (first in _CONTROL and size <= _CONTROL_BYTES_MAX)):
            self._left = True
            return 0
        if size > _CONTROL_BYTES_MAX:
            head = 4 if size == 126 else 10
            if there < head:
                return 0
            (size,) = _size_16(data, 2) if head == 4 else _size_64(data, 2)
        if self._mask:
            head += 4
            if there < head:
                return 0
        whole = head + size
        if plain and (size > self._size_max or (self._mask and data[head - 4 : head] != _NO_MASK)):
            self._left = True
            return 0
        if there >= whole:
            if plain:
                self._message(bytes(data[head:whole]))
            else:
                self._other(bytes(data[:whole]))
            return whole
        if not plain:
            return 0
        here = there - head
        large = bytearray(size if self._trusted else min(size, max(_CLAIM_BYTES, 2 * here)))
        large[:here] = data[head:]
        self._large, self._filled, self._claimed = large, here, size
        return there
