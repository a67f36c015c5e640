"""Real answers against the document that the service serves: status, media type, headers and schema."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from typing import Any

from jsonschema import Draft202012Validator


class Contract:
    """What a service promises. ``seen``: which operations answered with which status."""

    def __init__(self, document: Mapping[str, Any]) -> None:
        self.document = document
        self.seen: set[tuple[str, str, int]] = set()
        self._paths = sorted(
            ((_pattern(path), path) for path in document["paths"]), key=lambda pair: pair[1].count("{")
        )

    def check(self, method: str, path: str, status: int, headers: Mapping[str, str], body: bytes) -> None:
        """Fails unless the answer is one that the document tells of. Paths that it does not know are not looked at."""
        operation = self.operation("get" if method == "HEAD" else method.lower(), path.partition("?")[0])
        if operation is None:
            assert status in (401, 403, 404, 405, 400), (method, path, status)
            return
        name, described = operation
        self.seen.add((method.lower(), name, status))
        where = f"{method} {name} {status}"
        assert str(status) in described["responses"], f"{where}: not in the document"
        response = described["responses"][str(status)]
        for header in response.get("headers", {}):
            assert header in headers, f"{where}: no {header}"
        content = response.get("content")
        if method == "HEAD" or not body:
            return
        assert content, f"{where}: a body that is not in the document"
        media = headers.get("Content-Type", "").partition(";")[0]
        assert media in content, f"{where}: {media} is none of {list(content)}"
        if "json" in media and "ndjson" not in media:
            schema = {**content[media]["schema"], "components": self.document["components"]}
            for error in Draft202012Validator(schema).iter_errors(json.loads(body)):
                raise AssertionError(f"{where}: {error.json_path}: {error.message[:500]}")

    def operation(self, method: str, path: str) -> tuple[str, Any] | None:
        for pattern, name in self._paths:
            if pattern.match(path):
                described = self.document["paths"][name].get(method)
                if described is not None:
                    return name, described
        return None


def _pattern(path: str) -> re.Pattern[str]:
    return re.compile("\\A" + re.sub(r"{\w+}", "[^/]+", path) + "\\Z")
