"""Three verbs for scripts: push, pull, subscribe. Blocking, one topic, one shared connection per process.

::

    from ferryline import simple

    simple.push("customer-1", {"order": 7})
    key, value = simple.pull(timeout=5)
    stop = simple.subscribe(lambda key, value: print(key, value))

Where to connect is taken from FERRYLINE_URL, FERRYLINE_CA and FERRYLINE_TOKEN, or from `configure`. Values are JSON;
bytes travel as they are. Each program reads as one group, so that several copies share the work.
"""

from __future__ import annotations

import atexit
import threading
from collections.abc import Callable
from typing import Any

import msgspec

from ferryline import sync
from ferryline.protocol.errors import ClientClosed, NotFound, TopicExists, UnknownTopic

TOPIC, GROUP = "simple", "simple"

_lock = threading.RLock()
_settings: dict[str, Any] = {}
_client: Any = None
_producer: Any = None
_consumers: dict[tuple[str, str], Any] = {}
_reading: dict[tuple[str, str], threading.Lock] = {}  # one reader at a time for each consumer


def configure(urls: str | list[str] | None = None, *, ca: str | None = None, token: str | None = None) -> None:
    """Where to connect; before the first use, or after `close`."""
    with _lock:
        _settings.update(urls=urls, ca=ca, token=token)


def push(key: str | bytes | None, value: Any, *, topic: str = TOPIC, timeout: float = 30.0) -> int:
    """Send one record and wait until it is committed. Returns its offset. Creates the topic at the first use."""
    with _lock:
        producer = _get_producer()
    try:
        return int(producer.send(topic, value, key).offset)
    except UnknownTopic:
        _create(topic, timeout)
        return int(producer.send(topic, value, key).offset)


def pull(*, topic: str = TOPIC, group: str = GROUP, timeout: float = 30.0) -> tuple[str | None, Any] | None:
    """The next (key, value) for this group, or None when nothing came within ``timeout`` seconds.

    A record counts as processed when `pull` is called again.
    """
    with _lock:
        consumer = _get_consumer(topic, group)
        reading = _reading.setdefault((topic, group), threading.Lock())
    with reading:
        batch = consumer.pull(max_records=1, max_wait=timeout)
    return _pair(batch[0]) if batch else None


def subscribe(
    callback: Callable[[str | None, Any], None], *, topic: str = TOPIC, group: str = GROUP
) -> Callable[[], None]:
    """Call ``callback(key, value)`` for each record on a thread of its own. Returns a function that stops it."""
    stopping = threading.Event()
    with _lock:
        _ensure(topic)
        consumer = _get_client().consumer(topic, group=group)
        consumer.start()

    def run() -> None:
        try:
            while not stopping.is_set():
                for message in consumer.pull(max_records=1, max_wait=0.5):
                    callback(*_pair(message))
        except ClientClosed:
            pass  # `close` was called
        finally:
            consumer.close()

    thread = threading.Thread(target=run, name=f"ferryline-{topic}", daemon=True)
    thread.start()

    def stop() -> None:
        stopping.set()
        if threading.current_thread() is not thread:
            thread.join(10.0)

    return stop


def close() -> None:
    """Finish what was sent, commit what was processed, disconnect. Also done at exit."""
    global _client, _producer
    with _lock:
        client, _client, _producer = _client, None, None
        _consumers.clear()
        if client is not None:
            client.close()


atexit.register(close)


def _get_client() -> Any:
    global _client
    if _client is None:
        client = sync.connect(**_settings)
        client.start()
        _client = client
    return _client


def _get_producer() -> Any:
    global _producer
    if _producer is None:
        producer = _get_client().producer(linger=0)
        producer.start()
        _producer = producer
    return _producer


def _get_consumer(topic: str, group: str) -> Any:
    consumer = _consumers.get((topic, group))
    if consumer is None:
        _ensure(topic)
        consumer = _get_client().consumer(topic, group=group)
        consumer.start()
        _consumers[topic, group] = consumer
    return consumer


def _ensure(topic: str) -> None:
    try:
        _get_client().admin.describe_topic(topic)
    except NotFound:
        _create(topic, 30.0)


def _create(topic: str, timeout: float) -> None:
    try:
        _get_client().admin.create_topic(topic, timeout=timeout)
    except TopicExists:
        pass  # another program was faster


def _pair(message: Any) -> tuple[str | None, Any]:
    """Key and value as they were pushed: JSON is parsed, text decoded, bytes stay."""
    key = message.key.decode(errors="replace") if message.key is not None else None
    kind = message.headers.text("content-type")
    raw = message.raw
    if raw is not None and kind == "application/json":
        return key, msgspec.json.decode(raw)
    if raw is not None and kind.startswith("text/"):
        return key, raw.decode(errors="replace")
    return key, raw
