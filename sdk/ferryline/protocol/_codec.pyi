"""What both codecs of record batches offer. Used through ``records.py`` and ``message.py`` only."""

from collections.abc import Sequence
from typing import Any, Final, Protocol, TypeVar

from ferryline.protocol._codec_python import Buffer as Buffer
from ferryline.protocol._codec_python import Pairs as Pairs

T = TypeVar("T")
M = TypeVar("M", bound=MessageBase)

NAME: Final[str]  # "compiled" or "python"
COMPILED: Final[bool]
WHY: Final[str]  # why not the compiled one; "" when it is
CRC_KIND: Final[str]  # "sse4.2", "armv8", "table" or "aiokafka"

class DecodedRecord(Protocol):
    offset: int
    timestamp: int
    key: bytes | None
    value: bytes | None
    headers: Pairs

class Builder:
    """Encodes records into one batch as they come. Raises ValueError once it is spent."""

    @property
    def count(self) -> int: ...
    def __init__(self, bytes_max: int) -> None: ...
    def append(self, timestamp_ms: int, key: bytes | None, value: bytes | None, headers: Pairs, /) -> bool: ...
    def extend(self, rows: Sequence[tuple[int, bytes | None, bytes | None, Pairs]], /) -> int: ...
    def size(self) -> int: ...
    def build(self, producer_id: int, producer_epoch: int, base_sequence: int, /) -> bytearray: ...

class MessageBase:
    """A message as `decode_messages` makes it. A subclass adds no fields and says how to ``_parse`` a value."""

    @property
    def offset(self) -> int: ...
    @property
    def timestamp_ms(self) -> int: ...
    @property
    def key(self) -> bytes | None: ...
    @property
    def raw(self) -> bytes | None: ...
    @property
    def _source(self) -> Any: ...
    @property
    def _pairs(self) -> Pairs: ...
    @property
    def value(self) -> Any: ...
    def _parse(self) -> Any: ...

def crc32c(data: Buffer, start: int = 0, /) -> int: ...
def read_header(data: Buffer, at: int, kind: type[T], /) -> T | None:
    """The header at ``at``, or None: then the caller says in Python what is wrong with it, if anything is."""

def walk(data: Buffer, verify: bool, kind: type[T], /) -> list[tuple[int, T]] | None:
    """Positions and headers of all batches in ``data``, or None likewise."""

def decode_records(batch: Buffer, /) -> list[DecodedRecord]:
    """The records of one uncompressed batch. Raises ValueError."""

def decode_messages(batch: Buffer, kind: type[M], source: object, plain: bool, /) -> list[M]:
    """The records of one uncompressed batch as messages. ``plain``: the value needs no parsing. Raises ValueError."""

def without_gc(kind: type[M], /) -> type[M]:
    """Class decorator: the messages of this class are freed by reference counts alone."""
