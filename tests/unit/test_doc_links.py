"""Links between documents lead to a file and a heading that exist, and the index names every page."""

from __future__ import annotations

import re
import subprocess
from collections import Counter
from functools import cache
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
INDEX = ROOT / "docs/README.md"
_FENCE = re.compile(r"^ *(?:```|~~~).*?^ *(?:```|~~~) *$", re.MULTILINE | re.DOTALL)
_CODE = re.compile(r"`[^`\n]*`")
_LINK = re.compile(r"\]\(<?([^)\s>]+)>?(?: \"[^\"]*\")?\)|^\[[^\]\n]+\]: *(\S+)", re.MULTILINE)
_HEADING = re.compile(r"^#{1,6} +(.+?)(?: +#+)? *$", re.MULTILINE)
_ID = re.compile(r"<\w+[^>]* (?:id|name)=\"([^\"]+)\"")


def pages() -> list[Path]:
    """Every Markdown file of the repository, those that are not committed yet included."""
    command = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard", "*.md"]
    names = subprocess.run(command, cwd=ROOT, capture_output=True, check=True, text=True).stdout.split("\0")
    return sorted({ROOT / name for name in names if name and (ROOT / name).is_file()})


def prose(text: str) -> str:
    return _FENCE.sub("", text)


def anchor(heading: str) -> str:
    """As code hosts make it: small letters, no punctuation, spaces become dashes."""
    words = re.sub(r"!?\[([^\]]*)\]\([^)]*\)", r"\1", heading).replace("`", "").lower()
    return re.sub(r"[^\w\- ]", "", words).replace(" ", "-")


def anchors_of(text: str) -> set[str]:
    seen: Counter[str] = Counter()
    found = set(_ID.findall(text))
    for heading in _HEADING.findall(prose(text)):
        name = anchor(heading)
        found.add(f"{name}-{seen[name]}" if seen[name] else name)
        seen[name] += 1
    return found


@cache
def anchors(page: Path) -> frozenset[str]:
    return frozenset(anchors_of(page.read_text(encoding="utf-8")))


def links(text: str) -> list[str]:
    """Targets of links that stay in the repository."""
    found = [first or second for first, second in _LINK.findall(_CODE.sub("", prose(text)))]
    return [target for target in found if not re.match(r"[a-z][a-z0-9+.-]*:", target)]


def dead(page: Path, target: str) -> str:
    """Why a link of a page leads nowhere, "" if it leads somewhere."""
    name, _, heading = target.partition("#")
    there = (page.parent / name).resolve() if name else page
    if not there.exists():
        return f"{target}: there is no such file"
    if heading and there.suffix == ".md" and heading not in anchors(there):
        return f"{target}: {there.name} has no such heading"
    return ""


def test_every_link_leads_to_a_file_and_a_heading() -> None:
    found = []
    for page in pages():
        reasons = [dead(page, target) for target in links(page.read_text(encoding="utf-8"))]
        found += [f"{page.relative_to(ROOT)}: {reason}" for reason in reasons if reason]
    assert not found, "\n".join(found)


def test_the_index_names_every_page() -> None:
    text = INDEX.read_text(encoding="utf-8")
    named = {(INDEX.parent / target.partition("#")[0]).resolve() for target in links(text)}
    missing = [str(page.relative_to(ROOT)) for page in pages() if INDEX.parent in page.parents and page not in named]
    assert missing == ["docs/README.md"], "docs/README.md has no line for these"


def test_the_first_page_leads_to_the_index() -> None:
    assert "docs/README.md" in links((ROOT / "README.md").read_text(encoding="utf-8"))


def test_dead_links_are_found(tmp_path: Path) -> None:
    (tmp_path / "b.md").write_text('# What `it` does, and *why*\n## Twice\n## Twice\n<a id="here"></a>\n')
    page = tmp_path / "a.md"
    page.write_text(
        "# A\n[1](b.md#what-it-does-and-why) [2](b.md#twice-1) [3](b.md#here) [4](#a) [5](https://example.org/x#y)\n"
        "[6](c.md) [7](b.md#thrice) [8](#b)\n`[9](no.md)`\n```\n# B\n[10](no.md)\n```\n[11]: d.md\n"
    )
    found = [dead(page, target) for target in links(page.read_text())]
    assert [reason for reason in found if reason] == [
        "c.md: there is no such file",
        "b.md#thrice: b.md has no such heading",
        "#b: a.md has no such heading",
        "d.md: there is no such file",
    ]
