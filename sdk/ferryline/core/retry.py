"""Back-off: how long to wait before the next try. Pure: jitter is an argument.

Full jitter above a floor: many clients that lost the same primary at the same moment must not come back at the same
moment, and none of them may spin. Where a service has told when to come again, that counts and nothing else.
"""

from __future__ import annotations

import msgspec

from ferryline.protocol.errors import FerrylineError

TOLD_MS_MAX = 600_000  # no service is waited for longer than this, whatever it says
_MASK = 2**64 - 1


def told_ms(error: BaseException | None) -> int:
    """How long a service told us to wait (``retry_after_ms``); 0: it did not say."""
    if not isinstance(error, FerrylineError):
        return 0
    told = error.details.get("retry_after_ms", 0)
    return min(TOLD_MS_MAX, max(0, told)) if type(told) is int else 0


class Backoff(msgspec.Struct, frozen=True):
    """Delays double from ``first_ms`` up to ``cap_ms``."""

    first_ms: int = 10
    cap_ms: int = 1_000

    def delay_ms(self, failures: int, jitter: float) -> int:
        """Wait after ``failures`` (1 or more) failures in a row; ``jitter`` in [0, 1). Never below 1 ms.

        Half of the delay is certain and half is jitter, so that even an unlucky draw does not hammer a dead broker.
        """
        full = min(self.cap_ms, self.first_ms << min(max(failures, 1) - 1, 20))
        return max(1, int(full * (0.5 + 0.5 * jitter)))

    def pause_ms(self, failures: int, jitter: float, error: BaseException | None) -> int:
        """Wait after ``failures``, of which ``error`` was the last: as long as it tells, or like `delay_ms`.

        A little longer than told: clocks do not run alike, and those who were told the same are not to meet again.
        """
        told = told_ms(error)
        return told + 1 + int(told * 0.1 * jitter) if told else self.delay_ms(failures, jitter)


class Jitter:
    """A small deterministic stream of numbers (splitmix64). The seed decides; a driver passes a random one."""

    __slots__ = ("_state",)

    def __init__(self, seed: int) -> None:
        self._state = seed & _MASK

    def next_bits(self) -> int:
        self._state = (self._state + 0x9E3779B97F4A7C15) & _MASK
        mixed = self._state
        mixed = ((mixed ^ (mixed >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
        mixed = ((mixed ^ (mixed >> 27)) * 0x94D049BB133111EB) & _MASK
        return mixed ^ (mixed >> 31)

    def next(self) -> float:
        return (self.next_bits() >> 11) / 2**53
