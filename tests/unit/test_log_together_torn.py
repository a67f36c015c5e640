"""A start that opens many replicas with one sync, when the only batch of a log was torn by the end of its process."""

from __future__ import annotations

from pathlib import Path

import pytest

from ferryline_broker.log.files import FileStorage
from ferryline_broker.log.partition_log import PartitionLog
from ferryline_broker.log.steps import drained
from ferryline_broker.log.together import Together
from tests.unit.log_builders import append


@pytest.mark.parametrize("kept", [1, 30, 61, -1], ids=["one byte", "half a header", "a header", "all but one byte"])
def test_a_log_whose_only_batch_is_torn_opens_empty_and_the_common_sync_passes(tmp_path: Path, kept: int) -> None:
    """Found by chaos: the segment was removed, its closed file was still to be synced, and the broker did not start."""
    storage = FileStorage(str(tmp_path))
    log = PartitionLog.open(storage, "log")
    data = append(log)
    end = log.log_end
    log.close()
    path = tmp_path / "log" / f"{0:020d}.log"
    path.write_bytes(data[:kept])
    together = Together(storage)
    again = drained(PartitionLog.recover(storage, "log", together=together))
    together.settle()
    assert again.log_end == 0
    append(again)
    again.flush()
    assert again.log_end == end > 0
    again.close()
    storage.close()
