"""Files and directories of `MemoryStorage`: two images of each, and the queue of changes between them."""

from __future__ import annotations

import random

PAGE_BYTES = 4096
TRUNCATE = -1  # a queued truncation to n bytes stands at position TRUNCATE - n


class Inode:
    """A file: ``live`` is what readers see, ``disk`` what the medium holds, ``queue`` the writes between the two."""

    __slots__ = ("disk", "live", "path", "queue")

    def __init__(self, path: str) -> None:
        self.path = path
        self.live = bytearray()
        self.disk = bytearray()
        self.queue: list[tuple[int, bytes]] = []  # (position, data), or (TRUNCATE - size, b"")

    def sync(self) -> None:
        for position, data in self.queue:
            apply_write(self.disk, position, data)
        self.queue.clear()


def apply_write(image: bytearray, position: int, data: bytes) -> None:
    """Carry out one queued operation (a write, or a truncation) on an image; a gap reads as zeros."""
    if position < 0:
        size = TRUNCATE - position
        if size <= len(image):
            del image[size:]
        else:
            image.extend(bytes(size - len(image)))
        return
    end = len(image)
    if position == end:
        image += data
        return
    if position > end:
        image.extend(bytes(position - end))
    image[position : position + len(data)] = data


class Dir:
    __slots__ = ("durable", "entries", "queue")

    def __init__(self) -> None:
        self.entries: dict[str, Inode | Dir] = {}
        self.durable: dict[str, Inode | Dir] = {}
        self.queue: list[Change] = []


class Change:
    """One pending change of directories. A rename across two directories is one change that stands in both queues."""

    __slots__ = ("done", "parts")

    def __init__(self, parts: list[tuple[Dir, str, Inode | Dir | None]]) -> None:
        self.parts = parts
        self.done = False

    def apply(self) -> None:
        if self.done:
            return
        self.done = True
        for directory, name, node in self.parts:
            if node is None:
                directory.durable.pop(name, None)
            else:
                directory.durable[name] = node


def copied(directory: Dir) -> Dir:
    """A settled twin of what readers see below ``directory``."""
    twin = Dir()
    for name, node in directory.entries.items():
        if isinstance(node, Dir):
            twin.entries[name] = copied(node)
        else:
            inode = Inode(node.path)
            inode.live[:] = node.live
            inode.disk[:] = node.live
            twin.entries[name] = inode
    twin.durable = dict(twin.entries)
    return twin


def settle_names(directory: Dir, rng: random.Random) -> None:
    """A prefix of the pending changes of each directory reaches the medium, as ``rng`` decides."""
    below = {id(node): node for node in (*directory.durable.values(), *directory.entries.values())}
    for change in directory.queue[: rng.randint(0, len(directory.queue))]:
        change.apply()
    directory.queue.clear()
    for node in below.values():
        if isinstance(node, Dir):
            settle_names(node, rng)


def sync_tree(directory: Dir) -> None:
    """Everything pending below ``directory`` reaches the medium."""
    for change in directory.queue:
        change.apply()
    directory.queue.clear()
    for node in directory.entries.values():
        if isinstance(node, Dir):
            sync_tree(node)
        else:
            node.sync()


def cut_file(inode: Inode, rng: random.Random, holes: bool) -> None:
    """Let ``rng`` choose what of the queue reached the medium."""
    queue = inode.queue
    if queue:
        fate = rng.random()
        if fate < 0.3:
            pass
        elif holes and fate < 0.6:
            _keep_pages(inode, rng)
        elif fate < 0.9:
            kept = rng.randint(0, len(queue) - 1)
            for position, data in queue[:kept]:
                apply_write(inode.disk, position, data)
            position, data = queue[kept]
            if position >= 0 and data:
                apply_write(inode.disk, position, data[: rng.randint(0, len(data))])
        else:
            inode.sync()
        queue.clear()
    inode.live[:] = inode.disk


def _keep_pages(inode: Inode, rng: random.Random) -> None:
    """Any subset of the dirty pages arrives, in any order; missing ones read as zeros when the file grew past them."""
    for position, data in inode.queue:
        if position < 0:
            apply_write(inode.disk, position, data)
            continue
        at = 0
        while at < len(data):
            end = min(len(data), (position + at) // PAGE_BYTES * PAGE_BYTES + PAGE_BYTES - position)
            fate = rng.random()
            if fate < 0.5:
                kept = end if fate < 0.4 else rng.randint(at, end)  # a page may be torn, too
                apply_write(inode.disk, position + at, data[at:kept])
            at = end
