"""Changing the CA: each step is whole after a crash anywhere, and none comes out of turn."""

from __future__ import annotations

import asyncio
import os
import ssl
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import serialization

from ferryline.protocol.errors import Conflict, InvalidArgument
from ferryline.trust import Trust
from ferryline_coordinator.authority import Authority
from ferryline_coordinator.rotation import FINISH, ISSUE, ISSUED, ONE, STEPS, TRUST, TRUSTED, phase, signing, trusted
from ferryline_service.tls import TlsFiles, node_client_context
from unit.test_coordinator_standby import DictVault

CLUSTER = "0" * 32


def test_both_are_trusted_then_the_new_one_signs_then_the_old_one_is_gone(tmp_path: Path) -> None:
    authority = Authority(tmp_path)
    folder, old = authority.directory, authority.ca
    assert phase(folder) == ONE
    authority.rotate(TRUST)
    assert (phase(folder), trusted(folder)[0], authority.ca, len(trusted(folder))) == (TRUSTED, old, old, 2)
    new = trusted(folder)[1]
    authority.rotate(ISSUE)
    assert (phase(folder), trusted(folder), authority.ca) == (ISSUED, [new, old], new)
    authority.rotate(FINISH)
    assert (phase(folder), trusted(folder), authority.ca) == (ONE, [new], new)
    assert authority.ca_pem == authority.ca_path.read_text()
    assert sorted(path.name for path in folder.glob("ca*")) == ["ca.crt", "ca.key"]
    assert Authority(tmp_path).ca == new


@pytest.mark.parametrize("done", range(4))
def test_a_step_may_be_repeated_and_none_comes_out_of_turn(tmp_path: Path, done: int) -> None:
    authority = Authority(tmp_path)
    for step in STEPS[:done]:
        authority.rotate(step)
    before = authority.ca_path.read_bytes()
    allowed = {STEPS[done % 3], *STEPS[done - 1 : done]}
    for step in STEPS:
        if step not in allowed or (done == 3 and step == FINISH):
            with pytest.raises(Conflict, match="stands at"):
                authority.rotate(step)
    if 0 < done < 3:
        authority.rotate(STEPS[done - 1])
    assert authority.ca_path.read_bytes() == before
    with pytest.raises(InvalidArgument):
        authority.rotate("sideways")


def test_whatever_a_crash_leaves_is_put_right(tmp_path: Path) -> None:
    authority = Authority(tmp_path)
    folder = authority.directory
    authority.rotate(TRUST)
    old, new = trusted(folder)
    pem = [cert.public_bytes(serialization.Encoding.PEM) for cert in (new, old)]
    (folder / "ca.crt").write_bytes(b"".join(pem))  # `issue`, ended before the key was moved
    again = Authority(tmp_path)
    assert again.ca == new
    assert phase(folder) == ISSUED
    assert signing(folder)[0].public_key() == new.public_key()
    (folder / "ca-next.key").write_bytes(b"left over from a `trust` that ended half-way")
    assert signing(folder)[1] == new


def test_a_key_without_its_certificate_is_replaced_with_it(tmp_path: Path) -> None:
    """Whoever makes both may end in between; it has to start again all the same."""
    authority = Authority(tmp_path)
    cert, key = authority.coordinator_files(CLUSTER, [])
    before = cert.read_bytes()
    assert authority.coordinator_files(CLUSTER, []) == (cert, key)
    assert cert.read_bytes() == before
    key.write_bytes((authority.directory / "ca.key").read_bytes())
    TlsFiles(*authority.coordinator_files(CLUSTER, []), authority.ca_path)


async def test_coordinators_that_share_a_ca_change_it_together(tmp_path: Path) -> None:
    vault = DictVault()
    one, two = [await Authority.shared(tmp_path / name, vault) for name in ("1", "2")]
    old = one.ca
    for step, stands in ((TRUST, TRUSTED), (ISSUE, ISSUED), (FINISH, ONE)):
        with pytest.raises(Conflict, match="stands at"):
            await two.change_ca(FINISH if step != FINISH else TRUST)
        assert two.ca_pem == one.ca_pem, "a step out of turn changes nothing"
        await asyncio.gather(one.change_ca(step), *([two.change_ca(step)] if step != FINISH else []))
        assert await two.refresh() is (step == FINISH), "whoever took the step, too, has nothing to learn"
        assert not await one.refresh()
        for authority in (one, two, await Authority.shared(tmp_path / "3", vault)):
            assert (authority.phase, authority.ca_pem, authority.ca) == (stands, one.ca_pem, one.ca)
            assert authority.ca_path.read_text() == one.ca_pem
            assert len(trusted(authority.directory)) == (1 if stands == ONE else 2)
            certificate, _ = authority.coordinator_files(CLUSTER, [])
            x509.load_pem_x509_certificate(certificate.read_bytes()).verify_directly_issued_by(one.ca)
        assert (one.ca == old) is (step == TRUST)
    assert not list(tmp_path.glob("*/tls/ca*.key")), "no key is on a disk"


async def test_a_coordinator_that_was_away_learns_of_all_steps_at_once(tmp_path: Path) -> None:
    vault = DictVault()
    one, two = [await Authority.shared(tmp_path / name, vault) for name in ("1", "2")]
    before = vault.things["ca"]
    for step in STEPS:
        await one.change_ca(step)
    assert not await vault.replace("ca", before, b"what somebody makes of what he saw before")
    assert await two.refresh()
    assert (two.ca, two.ca_pem, two.phase) == (one.ca, one.ca_pem, ONE)
    assert not await Authority(tmp_path / "alone").refresh(), "nobody shares it"


async def test_what_was_read_before_a_step_is_not_taken_over_after_it(tmp_path: Path) -> None:
    vault = DictVault()
    one, read, held = await Authority.shared(tmp_path, vault), vault.read, asyncio.Event()

    async def slow(name: str) -> bytes | None:
        known = await read(name)
        await held.wait()
        return known

    vault.read = slow  # type: ignore[method-assign]
    looking = asyncio.create_task(one.refresh())
    await asyncio.sleep(0.01)
    vault.read = read  # type: ignore[method-assign]
    changing = asyncio.create_task(one.change_ca(TRUST))
    await asyncio.sleep(0.01)
    held.set()
    await asyncio.gather(looking, changing)
    assert (one.phase, len(trusted(one.directory))) == (TRUSTED, 2)


async def test_a_full_disk_hides_no_step_for_good(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    vault = DictVault()
    one, two = [await Authority.shared(tmp_path / name, vault) for name in ("1", "2")]
    await one.change_ca(TRUST)

    def full(*_: object, **__: object) -> None:
        raise OSError("no space left")

    with monkeypatch.context() as patch:
        patch.setattr("ferryline_coordinator.authority.write_durably", full)
        with pytest.raises(OSError, match="no space"):
            await two.refresh()
    assert await two.refresh(), "the file is still to be written"
    assert two.ca_path.read_text() == one.ca_pem


async def handshake(server: ssl.SSLContext, client: ssl.SSLContext) -> bytes:
    """What the server shows (DER)."""
    shown: bytes = b""

    async def served(_: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.close()

    listening = await asyncio.start_server(served, "127.0.0.1", 0, ssl=server)
    port = listening.sockets[0].getsockname()[1]
    try:
        _, writer = await asyncio.open_connection("127.0.0.1", port, ssl=client)
        shown = writer.get_extra_info("ssl_object").getpeercert(True)
        writer.close()
    finally:
        listening.close()
        await listening.wait_closed()
    return shown


async def test_a_listening_socket_shows_the_new_certificate_and_trusts_the_new_ca_alone(tmp_path: Path) -> None:
    authority = Authority(tmp_path)
    cert, key = authority.coordinator_files(CLUSTER, [])
    files = TlsFiles(cert, key, authority.ca_path)
    server = files.server
    old_client = node_client_context(authority.ca_path, cert, key)
    first = await handshake(server, files.client)
    assert await handshake(server, old_client) == first
    for step in STEPS:
        authority.rotate(step)
        authority.coordinator_files(CLUSTER, [])
        assert files.reload()
        assert not files.reload()
    assert await handshake(server, files.client) != first
    with pytest.raises(ssl.SSLError):
        await handshake(server, old_client)  # it trusts the old CA alone


def test_a_half_written_file_changes_nothing(tmp_path: Path) -> None:
    authority = Authority(tmp_path)
    cert, key = authority.coordinator_files(CLUSTER, [])
    files = TlsFiles(cert, key, authority.ca_path)
    before, good = files.client, cert.read_bytes()
    cert.write_bytes(good[:100])
    with pytest.raises(ssl.SSLError):
        files.reload()
    assert files.client is before
    cert.write_bytes(good)
    assert files.reload()


def test_a_client_takes_in_what_is_added_to_its_file(tmp_path: Path) -> None:
    here, other = Authority(tmp_path / "a"), Authority(tmp_path / "b")
    path = tmp_path / "ca.crt"
    path.write_text(here.ca_pem)
    trust = Trust(str(path))
    for text in ("nonsense", here.ca_pem + other.ca_pem):
        path.write_text(text)
        os.utime(path, ns=(1, len(text)))
        trust.refresh()
    assert len(trust.context.get_ca_certs()) == 2
    path.unlink()
    trust.refresh()
    assert len(trust.context.get_ca_certs()) == 2
