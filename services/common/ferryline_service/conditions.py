"""Conditional requests (RFC 9110, 13): ETag, If-None-Match, If-Match. What an ETag says is the caller's business."""

from __future__ import annotations

import hashlib
import json
import re
from typing import Any

from aiohttp import web

from ferryline.protocol.errors import InvalidArgument

TAGS_MAX = 100
TAGS_CHARS_MAX = 4_000  # of one header: well below what a whole line of HTTP may have
_TAGS = re.compile(r'\A\s*(?:W/)?"[\x21\x23-\x7e]{0,200}"\s*(?:,\s*(?:W/)?"[\x21\x23-\x7e]{0,200}"\s*)*\Z')
_TAG = re.compile(r'(W/)?"([^"]*)"')


def given_tags(request: web.Request, header: str) -> list[tuple[bool, str]] | None:
    """(weak, tag) of a header; ``[(False, "*")]`` for any; None without the header. Raises InvalidArgument."""
    given = request.headers.getall(header, [])
    if not given:
        return None
    text = ",".join(given)
    if text.strip() == "*":
        return [(False, "*")]
    if len(text) > TAGS_CHARS_MAX or not _TAGS.match(text):
        raise InvalidArgument(f"{header}: expected * or a list of entity tags in quotes", field=header)
    found = [(bool(weak), tag) for weak, tag in _TAG.findall(text)]
    if len(found) > TAGS_MAX:
        raise InvalidArgument(f"{header}: {len(found)} tags are over the limit of {TAGS_MAX}", field=header)
    return found


def expected(request: web.Request) -> tuple[str, ...]:
    """Tags of If-Match, one of which must be that of what is changed; () when anything may be. A weak one never is."""
    tags = given_tags(request, "If-Match")
    return () if tags is None else tuple(f"W/{tag}" if weak else tag for weak, tag in tags)


def digest_of(shown: Any) -> str:
    """16 hex digits that change with what is shown."""
    return hashlib.blake2b(json.dumps(shown, sort_keys=True).encode(), digest_size=8).hexdigest()


def tagged(request: web.Request, shown: Any, tag: str, status: int = 200) -> web.Response:
    """``shown`` as JSON with its tag; 304 without it for who has it already."""
    headers = {"ETag": f'"{tag}"', "Cache-Control": "no-cache"}
    known = given_tags(request, "If-None-Match") if request.method in ("GET", "HEAD") else None
    if known is not None and any(one in (tag, "*") for _, one in known):
        return web.Response(status=304, headers=headers)
    return web.json_response(shown, status=status, headers=headers)
