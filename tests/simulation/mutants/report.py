"""What the last runs found, kept in a file, and the page that is made of it."""

from __future__ import annotations

from pathlib import Path

import msgspec

from tests.simulation.mutants import MUTANTS
from tests.simulation.mutants.hunting import Verdict

ROOT = Path(__file__).parents[3]
RESULTS = ROOT / "benchmarks/results/sim-mutants.json"
PAGE = ROOT / "docs/simulation-mutants.md"
BEGIN, END = "<!-- table -->", "<!-- end of table -->"


def load() -> dict[str, Verdict]:
    """The last verdict on each mutant that still exists."""
    known = {mutant.name for mutant in MUTANTS}
    found = msgspec.json.decode(RESULTS.read_bytes(), type=list[Verdict]) if RESULTS.exists() else []
    return {verdict.name: verdict for verdict in found if verdict.name in known}


def save(verdict: Verdict, commit: str) -> None:
    """Keep one verdict, and bring the page up to date."""
    verdicts = load()
    verdict.commit = commit
    verdicts[verdict.name] = verdict
    ordered = [verdicts[mutant.name] for mutant in MUTANTS if mutant.name in verdicts]
    RESULTS.parent.mkdir(parents=True, exist_ok=True)
    RESULTS.write_bytes(msgspec.json.format(msgspec.json.encode(ordered), indent=1) + b"\n")
    write_page(verdicts)


def table(verdicts: dict[str, Verdict]) -> str:
    """A Markdown table of all mutants, in the order of the list."""
    caught = [verdict for verdict in verdicts.values() if verdict.caught]
    lines = [
        f"{len(MUTANTS)} seeded bugs, {len(caught)} caught.",
        "",
        "| bug | rule | what is wrong | seeds | weather | caught by | replay |",
        "|---|---|---|---|---|---|---|",
    ]
    for mutant in MUTANTS:
        verdict = verdicts.get(mutant.name)
        what = f"| `{mutant.name}` | {mutant.rule} | {mutant.about} "
        if verdict is None:
            lines.append(f"{what}| not run | | | |")
        elif not verdict.caught:
            lines.append(f"{what}| over {verdict.seeds} | {verdict.weather} | {verdict.error or 'nothing'} | |")
        else:
            log = ", real log" if mutant.real_log else ""
            replay = f"`{verdict.config}` {verdict.seed}{log}"
            rule = verdict.rule.replace("|", "\\|")
            lines.append(f"{what}| {verdict.seeds} | {verdict.weather or 'drawn'} | {rule} | {replay} |")
    return "\n".join(lines)


def write_page(verdicts: dict[str, Verdict]) -> None:
    """Replace the table in the page; the words around it are written by hand."""
    text = PAGE.read_text()
    before, _, rest = text.partition(BEGIN)
    _, _, after = rest.partition(END)
    PAGE.write_text(f"{before}{BEGIN}\n{table(verdicts)}\n{END}{after}")
