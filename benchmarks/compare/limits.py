"""The physical limit: the same bytes through raw TLS sockets and onto the disk, without any queue.

Throughput: one process writes the bytes of a workload to another one over TLS 1.3, which throws them away; one process
appends them to a file in chunks of 256 KiB with an fdatasync after each. Latency: one record to another process, which
appends it, fdatasyncs and answers one byte: what a flushed confirmation costs at least.
"""

from __future__ import annotations

import multiprocessing
import os
import socket
import ssl
import subprocess
import tempfile
import time
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from benchmarks.compare.spec import KEY_BYTES, latencies

CHUNK = 256 * 1024
PINGS = 500


def limits(sizes: tuple[int, ...], total_bytes: int, rounds: int, folder: Path) -> dict[str, Any]:
    """For each size of a value records a second (``sockets``, ``disk``) and latencies of one at a time."""
    with tempfile.TemporaryDirectory(prefix="bench-limits-", dir=folder) as name:
        here = Path(name)
        _certificate(here)
        found: dict[str, Any] = {"sockets": {}, "disk": {}, "one_at_a_time_ms": []}
        for _ in range(rounds):
            for size in sizes:
                records = max(1, total_bytes // (size + KEY_BYTES))
                found["sockets"].setdefault(str(size), []).append(records / tls_seconds(here, total_bytes))
                found["disk"].setdefault(str(size), []).append(records / disk_seconds(here, total_bytes))
            found["one_at_a_time_ms"].append(ping_latencies(here, 100 + KEY_BYTES))
        return found


def _certificate(folder: Path) -> None:
    command = ["openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes"]
    command += ["-keyout", str(folder / "key"), "-out", str(folder / "crt"), "-days", "1", "-subj", "/CN=localhost"]
    subprocess.run(command, check=True, capture_output=True)


def _serve(folder: str, pipe: Connection, flushed: bool) -> None:
    """Child: take one connection and read to its end; with ``flushed`` write each piece to the disk and answer."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(f"{folder}/crt", f"{folder}/key")
    with socket.create_server(("127.0.0.1", 0)) as server:
        pipe.send(server.getsockname()[1])
        plain, _ = server.accept()
        plain.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        with context.wrap_socket(plain, server_side=True) as connection, open(f"{folder}/pings", "wb") as file:
            buffer = bytearray(CHUNK)
            total = 0
            while count := connection.recv_into(buffer):
                total += count
                if flushed:
                    os.write(file.fileno(), memoryview(buffer)[:count])
                    os.fdatasync(file.fileno())
                    connection.sendall(b"+")
            pipe.send(total)


def _connection(folder: Path, *, flushed: bool) -> tuple[ssl.SSLSocket, Connection, Any]:
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    child = context.Process(target=_serve, args=(str(folder), theirs, flushed), daemon=True)
    child.start()
    plain = socket.create_connection(("127.0.0.1", ours.recv()))
    plain.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    trust = ssl.create_default_context(cafile=str(folder / "crt"))
    return trust.wrap_socket(plain, server_hostname="localhost"), ours, child


def tls_seconds(folder: Path, total: int) -> float:
    """Seconds until the other process has read ``total`` bytes."""
    connection, pipe, child = _connection(folder, flushed=False)
    data = os.urandom(CHUNK)
    started = time.perf_counter()
    for begin in range(0, total, CHUNK):
        connection.sendall(data[: total - begin])
    connection.shutdown(socket.SHUT_WR)  # closing at once would reset the connection and drop what is on its way
    assert pipe.recv() == total, "bytes were lost on loopback"
    seconds = time.perf_counter() - started
    connection.close()
    child.join()
    return seconds


def disk_seconds(folder: Path, total: int) -> float:
    """Seconds to append ``total`` bytes with an fdatasync after each chunk."""
    data = os.urandom(CHUNK)
    with (folder / "disk").open("wb") as file:
        started = time.perf_counter()
        for begin in range(0, total, CHUNK):
            os.write(file.fileno(), data[: total - begin])
            os.fdatasync(file.fileno())
        return time.perf_counter() - started


def ping_latencies(folder: Path, size: int) -> dict[str, float]:
    """Percentiles in ms of: send one record over TLS, written and flushed there, answered."""
    connection, pipe, child = _connection(folder, flushed=True)
    data = os.urandom(size)
    times = []
    for number in range(PINGS + 50):
        started = time.perf_counter_ns()
        connection.sendall(data)
        assert connection.recv(1) == b"+"
        if number >= 50:
            times.append(time.perf_counter_ns() - started)
    connection.shutdown(socket.SHUT_WR)
    assert pipe.recv() == size * (PINGS + 50)
    connection.close()
    child.join()
    return latencies(times)
