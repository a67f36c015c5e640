"""Seeded bugs: the list is complete, the patching is exact, and a catch is only a catch if the product passes."""

from __future__ import annotations

import random
from pathlib import Path

import pytest

from ferryline.protocol.metadata import PartitionMeta
from ferryline_broker.core.epochs import EpochIndex
from ferryline_broker.core.insync import InSyncSet
from ferryline_coordinator.core import coordinator as importer
from ferryline_coordinator.core import elections
from tests.simulation.mutants import MUTANTS, hunting, patching, report
from tests.simulation.mutants.hunting import Verdict, hunt, in_child
from tests.simulation.mutants.model import Mutant
from tests.simulation.mutants.patching import PatchFailed, apply, find, patch
from tests.simulation.runner import Outcome
from tests.simulation.settings import ALL, draw, parse_configs
from tests.simulation.weather import PROFILES, SHARE, profile_of, shape

# fmt: off
TABLE_ROWS = {
    "truncate-to-watermark", "shrink-counts-proposed", "expand-counts-committed", "no-version-check",
    "join-without-leso", "min-isr-on-maximal", "ack-before-fsync", "effects-before-commit", "unclean-election",
    "stale-diverging-heeded", "same-epoch-after-restart", "unclean-stays-candidate", "no-broker-epoch-on-add",
    "lossy-flag-not-sticky", "registration-not-idempotent", "fetch-epoch-unchecked", "progress-unchecked",
    "progress-session-unchecked", "replay-to-watermark", "void-rule-off", "state-served-early",
    "hand-over-to-anyone", "no-dedupe", "dedupe-not-rebuilt", "duplicate-acked-early", "no-gap-check",
    "unknown-producer-any-seq", "any-refusal-heeded", "no-request-id", "coord-epoch-unchecked",
}  # every rule that the replication rules, section 11, switch off
# fmt: on


def _mutant(*edits: tuple[str, str, str], name: str = "a-bug", weather: str | None = None) -> Mutant:
    return Mutant(name, "L4", "something is wrong", "2/1/fsync", edits, weather)


# -- the list ---------------------------------------------------------------------------------------


def test_every_rule_of_the_tables_has_a_seeded_bug() -> None:
    assert {mutant.name for mutant in MUTANTS} >= TABLE_ROWS


def test_names_are_unique_and_every_bug_has_a_rule_a_sentence_and_an_edit() -> None:
    assert len({mutant.name for mutant in MUTANTS}) == len(MUTANTS)
    for mutant in MUTANTS:
        assert mutant.rule, mutant.name
        assert mutant.about, mutant.name
        assert mutant.edits, mutant.name


def test_configurations_and_weather_of_every_bug_exist() -> None:
    for mutant in MUTANTS:
        assert parse_configs(mutant.configs), mutant.name
        assert mutant.weather is None or mutant.weather in PROFILES, mutant.name


def test_no_edit_replaces_a_text_by_itself() -> None:
    for mutant in MUTANTS:
        for target, old, new in mutant.edits:
            assert old != new, (mutant.name, target)


# -- patching ---------------------------------------------------------------------------------------


def test_a_patched_method_behaves_differently_and_only_in_its_own_process() -> None:
    def patched() -> int:
        patch("EpochIndex.epoch_at", "if at >= 0 else -1", "if at >= 0 else 42")
        return EpochIndex().epoch_at(5)

    assert in_child(patched) == 42
    assert EpochIndex().epoch_at(5) == -1


def test_a_patched_function_reaches_whoever_imported_it_by_name() -> None:
    def patched() -> bool:
        patch("can_elect", "return part.primary == NO_BROKER and", "return True or")
        return vars(importer)["can_elect"] is elections.can_elect

    before = elections.can_elect
    assert in_child(patched) is True
    assert elections.can_elect is before


def test_a_patch_is_what_runs() -> None:
    def patched() -> bool:
        patch("settled", "if part.elr and", "if False and")
        return elections.settled(in_sync) is in_sync

    in_sync = PartitionMeta("t" * 32, 0, (1, 2), 1, 1, 1, (1,), elr=(2,), min_isr=1)
    assert elections.settled(in_sync) is not in_sync
    assert in_child(patched) is True


def test_text_that_is_gone_is_an_error() -> None:
    with pytest.raises(PatchFailed, match="occurs 0 times"):
        in_child(lambda: apply(_mutant(("InSyncSet.committable", "no such text", "pass"))))


def test_text_that_occurs_twice_is_an_error() -> None:
    with pytest.raises(PatchFailed, match="occurs"):
        in_child(lambda: apply(_mutant(("InSyncSet.committable", "replica", "copy"))))


@pytest.mark.parametrize("target", ["NoSuchClass.method", "InSyncSet.no_such_method", "no_such_function"])
def test_a_function_that_is_gone_is_an_error(target: str) -> None:
    with pytest.raises(PatchFailed):
        find(target)


def test_two_edits_of_one_function_add_up() -> None:
    def source() -> str:
        apply(
            _mutant(
                ("InSyncSet.committable", "lowest = replica.flushed", "lowest = 0 + replica.flushed"),
                ("InSyncSet.committable", "lowest = 0 +", "lowest = 1 +"),
            )
        )
        return patching._source(InSyncSet.committable)

    assert "lowest = 1 + replica.flushed" in in_child(source)


def test_a_property_stays_a_property() -> None:
    def patched() -> bool:
        from ferryline_broker.core.primary import Primary

        patch("Primary.isr", "return self.sync.isr", "return (1,)")
        return isinstance(vars(Primary)["isr"], property)

    assert in_child(patched) is True


def test_a_process_that_dies_is_no_result() -> None:
    import os

    with pytest.raises(PatchFailed, match="without a result"):
        in_child(lambda: os._exit(3))


# -- hunting ----------------------------------------------------------------------------------------


def _runs(monkeypatch: pytest.MonkeyPatch, fails: set[int], fails_anyway: set[int]) -> None:
    """Stand-ins for a run: seeds of ``fails`` fail with the mutant, those of ``fails_anyway`` without it, too."""
    patched: list[bool] = []

    def run(config: object, seed: int, **_: object) -> Outcome:
        bad = seed in fails_anyway or (bool(patched) and seed in fails)
        return Outcome("2/1/fsync", seed, "broken" if bad else "", "D1.1" if bad else "")

    monkeypatch.setattr(hunting, "run_seed", run)
    monkeypatch.setattr(hunting, "apply", lambda _: patched.append(True))


def test_a_seed_that_fails_only_with_the_bug_is_a_catch(monkeypatch: pytest.MonkeyPatch) -> None:
    _runs(monkeypatch, {7}, set())
    verdict = hunt(_mutant(), 20, 1)
    assert (verdict.caught, verdict.seeds, verdict.seed, verdict.rule) == (True, 7, 7, "D1.1")


def test_a_seed_that_fails_anyway_is_no_catch(monkeypatch: pytest.MonkeyPatch) -> None:
    _runs(monkeypatch, {9}, {3})
    assert hunt(_mutant(), 20, 1).seed == 9


def test_a_bug_that_shows_nowhere_is_not_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    _runs(monkeypatch, set(), set())
    verdict = hunt(_mutant(), 20, 1)
    assert (verdict.caught, verdict.seeds) == (False, 20)
    assert "NOT CAUGHT in 20 seeds" in verdict.line()


def test_the_line_of_a_catch_says_how_to_repeat_it() -> None:
    verdict = Verdict("a-bug", 4, "2/1/fsync", 4, "echoes", "D1.1")
    assert "--config 2/1/fsync --seed 4 --weather echoes" in verdict.line()


# -- the page ---------------------------------------------------------------------------------------


def test_the_page_holds_what_was_found_between_its_marks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    page, results = tmp_path / "page.md", tmp_path / "results.json"
    page.write_text(f"before\n{report.BEGIN}\nold\n{report.END}\nafter\n")
    monkeypatch.setattr(report, "PAGE", page)
    monkeypatch.setattr(report, "RESULTS", results)
    monkeypatch.setattr(report, "MUTANTS", (_mutant(name="one"), _mutant(name="two")))
    report.save(Verdict("two", 12, "2/1/fsync", 12, "", "D1.6 | same"), "abc")
    report.save(Verdict("one", 5000), "abd")
    text = page.read_text()
    assert text.startswith("before\n")
    assert text.endswith("after\n")
    assert "old" not in text
    assert "2 seeded bugs, 1 caught" in text
    assert "| `one` | L4 | something is wrong | over 5000 |" in text
    assert "| 12 | drawn | D1.6 \\| same |" in text
    assert [(v.name, v.commit) for v in report.load().values()] == [("one", "abd"), ("two", "abc")]


def test_a_bug_that_was_taken_off_the_list_leaves_the_results(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    page = tmp_path / "page.md"
    page.write_text(report.BEGIN + report.END)
    monkeypatch.setattr(report, "PAGE", page)
    monkeypatch.setattr(report, "RESULTS", tmp_path / "results.json")
    monkeypatch.setattr(report, "MUTANTS", (_mutant(name="gone"),))
    report.save(Verdict("gone", 1), "abc")
    monkeypatch.setattr(report, "MUTANTS", (_mutant(name="new"),))
    assert report.load() == {}


# -- weather ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", sorted(PROFILES))
def test_a_profile_gives_the_same_weather_to_the_same_seed(name: str) -> None:
    first, second = (shape(draw(random.Random(5), ALL[0]), name, 5) for _ in range(2))
    assert first == second
    assert first.profile == name


def test_two_seeds_in_five_have_a_profile_and_each_profile_has_seeds() -> None:
    drawn = [profile_of(seed) for seed in range(2_000)]
    assert abs(sum(bool(name) for name in drawn) / 2_000 - SHARE) < 0.05
    assert set(drawn) - {""} == set(PROFILES)


def test_weather_without_a_profile_is_what_the_seed_drew() -> None:
    assert shape(draw(random.Random(5), ALL[0]), "", 5) == draw(random.Random(5), ALL[0])


def test_an_unknown_profile_is_an_error() -> None:
    with pytest.raises(KeyError):
        shape(draw(random.Random(5), ALL[0]), "sunshine", 5)
