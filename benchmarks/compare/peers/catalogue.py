"""All servers, by name."""

from __future__ import annotations

from benchmarks.compare.peers import Peer
from benchmarks.compare.peers.ferryline_peer import FerrylinePeer
from benchmarks.compare.peers.kafka_peer import Kafka1, Kafka3
from benchmarks.compare.peers.nats_peer import Nats1, Nats3
from benchmarks.compare.peers.rabbitmq_peer import Rabbitmq1, Rabbitmq3
from benchmarks.compare.peers.redis_peer import RedisAlways, RedisEverysec

PEERS: dict[str, type[Peer]] = {
    one.name: one
    for one in (FerrylinePeer, Kafka3, Kafka1, Rabbitmq3, Rabbitmq1, Nats3, Nats1, RedisAlways, RedisEverysec)
}
