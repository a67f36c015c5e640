"""Which codec of record batches is in use: the compiled one, or the one in Python where it is missing.

``FERRYLINE_CODEC`` in the environment of a process forces ``compiled`` or ``python``; ``auto`` is the default. It is
read once, at import. `ferryline doctor` tells which one it is.
"""

import os

VERSION = 1  # of what the compiled module offers; a module of another version was built from other sources

try:
    from ferryline.protocol import _codec_compiled as _compiled
except ImportError as missing:
    _compiled, WHY = None, f"not built: {missing}"
else:
    WHY = ""
    if _compiled.CODEC_VERSION != VERSION:
        _compiled, WHY = (
            None,
            f"of version {_compiled.CODEC_VERSION}, this package needs {VERSION}; build it again",
        )

_wish = os.environ.get("FERRYLINE_CODEC", "auto")
if _wish not in ("auto", "compiled", "python"):
    raise ImportError(f"FERRYLINE_CODEC: {_wish!r} is none of auto, compiled, python")
if _wish == "compiled" and _compiled is None:
    raise ImportError(f"FERRYLINE_CODEC=compiled, but the compiled codec is {WHY}")

if _compiled is not None and _wish != "python":
    NAME = "compiled"
    _chosen = _compiled
else:
    from ferryline.protocol import _codec_python as _chosen

    NAME, WHY = "python", WHY or "FERRYLINE_CODEC=python"

COMPILED = NAME == "compiled"
CRC_KIND = _chosen.CRC_KIND
Builder = _chosen.Builder
MessageBase = _chosen.MessageBase
crc32c = _chosen.crc32c
decode_messages = _chosen.decode_messages
decode_records = _chosen.decode_records
read_header = _chosen.read_header
walk = _chosen.walk
without_gc = _chosen.without_gc
