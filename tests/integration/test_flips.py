"""A short part of the flip campaign, and proof that it would notice."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import pytest

from ferryline.protocol.records import split_batches
from ferryline_broker.log.segment import Segment
from tests.integration import flip_campaign

FLIPS = 40


def broken(outcomes: dict[str, int]) -> int:
    return sum(outcomes.get(name, 0) for name in flip_campaign.BROKEN)


def test_every_flip_is_detected_or_harmless(tmp_path: Path) -> None:
    outcomes, _, stories = flip_campaign.campaign(100_000, FLIPS, tmp_path)
    assert broken(outcomes) == 0, stories
    assert sum(outcomes.values()) == FLIPS


def test_a_reader_that_checks_nothing_is_found_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Segment, "check_slice", lambda *_: None)
    monkeypatch.setattr(flip_campaign, "split_batches", partial(split_batches, verify=False))
    outcomes, _, _ = flip_campaign.campaign(100_000, FLIPS, tmp_path)
    assert outcomes["wrong bytes served"] > 0


def test_a_copy_that_forgets_its_epoch_is_found_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(flip_campaign.ReplicaStore, "persist_epoch", lambda *_: None)
    outcomes, _, _ = flip_campaign.campaign(100_000, FLIPS, tmp_path)
    assert broken(outcomes) > 0
