"""Settings, the first join, and the switches that only proofs may use."""

from __future__ import annotations

import asyncio
import tomllib
from pathlib import Path

import pytest

from ferryline.protocol.errors import Forbidden
from ferryline_broker.__main__ import main
from ferryline_broker.config import load_config
from ferryline_broker.core.partition import PartitionCore
from ferryline_broker.join import TlsFolder, claim_token, join
from ferryline_broker.lossy import LossyStorage
from ferryline_broker.sabotage import core_class, lossy_storage
from unit.broker_world import BrokerWorld, ScriptedCoordinator, eventually


def test_flags_beat_the_environment_and_the_environment_beats_the_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "broker.toml"
    file.write_text('data_root = "/from/file"\nport = 1111\nhost = "10.0.0.1"\nlag_max_ms = 4000\n')
    monkeypatch.setenv("FERRYLINE_BROKER_PORT", "2222")
    monkeypatch.setenv("FERRYLINE_BROKER_HOST", "10.0.0.2")
    monkeypatch.setenv("FERRYLINE_BROKER_COORDINATOR", "https://a:1, https://b:2")
    config = load_config({"host": "10.0.0.3"}, file)
    assert (str(config.data_root), config.port, config.host) == ("/from/file", 2222, "10.0.0.3")
    assert config.lag_max_ms == 4000
    assert config.coordinator == ["https://a:1", "https://b:2"]


def test_the_printed_settings_can_be_read_back_and_hide_the_token(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["--data-root", "/d", "--coordinator", "https://a:1", "--join-token", "secret", "--print-config"]) == 0
    text = capsys.readouterr().out
    assert "secret" not in text
    shown = tomllib.loads(text)
    assert (shown["data_root"], shown["coordinator"], shown["join_token"]) == ("/d", ["https://a:1"], "***")


@pytest.mark.parametrize(
    ("flags", "field"),
    [
        ([], "data_root"),
        (["--data-root", "/d", "--port", "70000"], "port"),
        (["--data-root", "/d", "--coordinator", "http://plain:1"], "coordinator"),
        (["--data-root", "/d", "--join-token", "a", "--join-token-dir", "/t"], "join_token"),
        (["--data-root", "/d", "--log-form", "prose"], "log_form"),
        (["--data-root", "/d", "--config", "/no/such/file.toml"], "/no/such/file.toml"),
    ],
)
def test_a_wrong_setting_is_named(flags: list[str], field: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(flags) == 2
    assert field in capsys.readouterr().err


async def test_a_broker_joins_with_a_token_and_keeps_its_key(tmp_path: Path) -> None:
    coordinator = ScriptedCoordinator(tmp_path / "c")
    await coordinator.start()
    try:
        config = load_config(
            {
                "data_root": tmp_path,
                "coordinator": [coordinator.url],
                "ca_file": coordinator.ca.file,
                "join_token": "token-1",
            }
        )
        tls = TlsFolder(tmp_path / "tls")
        joined = await join(config, tls, "storage", "https://127.0.0.1:1", "https://127.0.0.1:1")
        assert joined is not None
        assert joined.broker_id == 1
        assert tls.complete
        tls.files()  # key and certificate belong together
        assert (tls.key.stat().st_mode & 0o077) == 0
        with pytest.raises(Forbidden):
            await join(config, TlsFolder(tmp_path / "tls2"), "other", "https://127.0.0.1:1", "https://127.0.0.1:1")
    finally:
        await coordinator.stop()


async def test_brokers_that_share_a_folder_of_tokens_take_different_ones(tmp_path: Path) -> None:
    folder = tmp_path / "tokens"
    folder.mkdir()
    for number in range(3):
        (folder / f"t{number}").write_text(f"token-{number}\n")
    (folder / "t9.tmp").write_text("half written")
    config = load_config({"data_root": tmp_path, "join_token_dir": folder})
    taken = [claim_token(config, f"storage{number}") for number in range(4)]
    assert taken == ["token-0", "token-1", "token-2", ""]
    assert claim_token(config, "storage1") == "token-1", "an interrupted join finds its own token again"


async def test_a_join_waits_for_its_coordinator_and_can_be_stopped(tmp_path: Path) -> None:
    config = load_config({"data_root": tmp_path, "coordinator": ["https://127.0.0.1:9"], "join_token": "t"})
    stop = asyncio.Event()
    asyncio.get_running_loop().call_later(0.1, stop.set)
    tls = TlsFolder(tmp_path / "tls")
    assert await join(config, tls, "s", "https://127.0.0.1:1", "https://127.0.0.1:1", stopped=stop.is_set) is None


async def test_a_certificate_that_lacks_a_name_is_renewed_while_the_broker_serves(tmp_path: Path) -> None:
    async with BrokerWorld(tmp_path) as world:
        broker = await world.broker(tls_names=["orders.example"])
        renewal = broker.broker.renewal
        await eventually(lambda: renewal.due() == "", "the new name is in the certificate")
        assert await world.client(broker.url), "new sessions get the new certificate"


def test_sabotage_needs_a_second_permission(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("FERRYLINE_ALLOW_SABOTAGE", raising=False)
    assert core_class() is PartitionCore
    monkeypatch.setenv("FERRYLINE_SABOTAGE", "ack-before-flush")
    monkeypatch.setenv("FERRYLINE_TEST_LOSSY_STORAGE", "1")
    with pytest.raises(ValueError, match="FERRYLINE_ALLOW_SABOTAGE"):
        core_class()
    with pytest.raises(ValueError, match="FERRYLINE_ALLOW_SABOTAGE"):
        lossy_storage()
    monkeypatch.setenv("FERRYLINE_ALLOW_SABOTAGE", "1")
    assert core_class() is not PartitionCore
    assert lossy_storage()
    monkeypatch.setenv("FERRYLINE_SABOTAGE", "typo")
    with pytest.raises(ValueError, match="typo"):
        core_class()


async def crash_of_all(tmp_path: Path, *, kill: int) -> list[bytes]:
    """Produce on lossy disks, lose ``kill`` brokers as by a power cut, and read what is left of ten records."""
    from unit.test_broker_path import read_all

    async with BrokerWorld(tmp_path) as world:
        root = str(tmp_path / "brokers")
        first = await world.broker(storage=LossyStorage(root))
        second = await world.broker(storage=LossyStorage(root))
        topic = await world.topic("orders", [(first.id, second.id)])
        client = await world.client(first.url)
        if kill == 1 and core_class() is not PartitionCore:
            second.broker.peers.close()  # the link to the primary is cut; an honest primary would wait
        for value in range(10):
            assert (await client.produce(topic, 0, [b"%d" % value])).error is None
        for running in (first, second)[:kill]:
            await running.crash()
            world.coordinator.fence(running.id)
        if kill == 2:
            await world.broker(storage=LossyStorage(root))
            await world.broker(storage=LossyStorage(root))
        await eventually(lambda: world.primary(topic.id), "somebody leads")
        leader = world.primary(topic.id)
        assert leader is not None
        return await read_all(await world.client(leader.url), topic)


ALL = [b"%d" % value for value in range(10)]


async def test_a_power_cut_of_all_loses_nothing_that_was_acknowledged(tmp_path: Path) -> None:
    assert await crash_of_all(tmp_path, kill=2) == ALL


@pytest.mark.parametrize(("kind", "kill"), [("ack-before-flush", 2), ("ack-before-replicate", 1)])
async def test_sabotage_loses_what_it_acknowledged(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str, kill: int
) -> None:
    """If this finds every record, the proofs that rest on these switches prove nothing."""
    monkeypatch.setenv("FERRYLINE_ALLOW_SABOTAGE", "1")
    monkeypatch.setenv("FERRYLINE_SABOTAGE", kind)
    left = await crash_of_all(tmp_path, kill=kill)
    assert len(left) < 10
