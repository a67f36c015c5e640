"""Storage: the interface, the real disk and the one of tests, under one name."""

from ferryline_broker.log.files import FileStorage
from ferryline_broker.log.interface import Bytes, FileHandle, Lock, LogDamaged, Storage
from ferryline_broker.log.memory import Faults, MemoryStorage, SimulatedStop

__all__ = [
    "Bytes",
    "Faults",
    "FileHandle",
    "FileStorage",
    "Lock",
    "LogDamaged",
    "MemoryStorage",
    "SimulatedStop",
    "Storage",
]
