"""Which topics a record reaches through exchanges. Pure; clients route with it, and the coordinator can say the same.

The cost is bounded whatever is bound: all patterns of an exchange are followed at once (`TopicPatterns`), an exchange
is looked at once for each record, and answers are kept, up to a limit, by what of a record they depend on.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import lru_cache

from ferryline.protocol.errors import UnknownExchange
from ferryline.protocol.exchanges import DIRECT, FANOUT, MATCH_ANY, TOPIC, BindingMeta, ExchangeMeta

ANSWERS_MAX = 4_096  # routes that are remembered
MASKS_MAX = 256  # words whose places are remembered, for each exchange

Pairs = Iterable[tuple[str, bytes | None]]
Present = tuple[tuple[str, bytes | None], ...]  # headers that a binding asks for, as far as they matter
Match = Callable[[str, Present], Iterable[BindingMeta]]


def words_of(text: str) -> list[str]:
    """The words of a routing key or pattern; the empty key has none."""
    return text.split(".") if text else []


class TopicPatterns:
    """Many patterns as one automaton that follows all of them at once, word by word.

    A pattern of n words has n + 1 *places* in one long integer; at its place i, its first i words are used up:

        a.#.b     0 --a--> 1 --any word--> 1,   1 --no word--> 2 --b--> 3, where it has matched

    Each word of a key moves all places together, in a few operations on the integer. So a key costs (its words) times
    (the places of all patterns, in bits), whatever the patterns are: nothing is ever tried a second time.
    """

    def __init__(self, patterns: Sequence[str]) -> None:
        places: dict[str, list[int]] = {"*": [], "#": []}  # word -> places that wait for it
        starts: list[int] = []
        self._numbers: dict[int, int] = {}  # last place of a pattern -> its number
        place = 0
        for number, pattern in enumerate(patterns):
            starts.append(place)
            before = ""
            for word in words_of(pattern):
                if word == before == "#":
                    continue  # says no more than one of them; so after a "#" one step is enough to pass it
                places.setdefault(word, []).append(place)
                place += 1
                before = word
            self._numbers[place] = number
            place += 1
        self._bytes = place // 8 + 1
        self._star = self._mask(places.pop("*"))
        self._hash = self._mask(places.pop("#"))
        self._last = self._mask(self._numbers)
        self._places = places
        self._start = self._passed(self._mask(starts))
        self._masks: dict[str, int] = {}  # made when asked for: one for each word of a large exchange were too much

    def matching(self, key: str) -> list[int]:
        """Numbers of the patterns that match, in order."""
        at = self._start
        for word in words_of(key):
            at = self._passed(((at & (self._waiting_for(word) | self._star)) << 1) | (at & self._hash))
        found, numbers = at & self._last, []
        while found:
            lowest = found & -found
            numbers.append(self._numbers[lowest.bit_length() - 1])
            found ^= lowest
        return numbers

    def _passed(self, at: int) -> int:
        """A "#" may also stand for no word."""
        return at | ((at & self._hash) << 1)

    def _waiting_for(self, word: str) -> int:
        mask = self._masks.get(word)
        if mask is None:
            places = self._places.get(word)
            if places is None:
                return 0
            if len(self._masks) >= MASKS_MAX:
                self._masks.clear()
            mask = self._masks[word] = self._mask(places)
        return mask

    def _mask(self, places: Iterable[int]) -> int:
        bits = bytearray(self._bytes)
        for place in places:
            bits[place >> 3] |= 1 << (place & 7)
        return int.from_bytes(bits, "little")


class RoutingTable:
    """Routes of one set of exchanges. ``before``: the table of an earlier set, whose unchanged parts are taken over."""

    def __init__(self, exchanges: Mapping[str, ExchangeMeta], before: RoutingTable | None = None) -> None:
        self.exchanges = exchanges
        self._matches: dict[str, tuple[ExchangeMeta, Match]] = {}
        if before is not None:
            self._matches = {n: pair for n, pair in before._matches.items() if exchanges.get(n) is pair[0]}
        self._asked: dict[str, set[bytes]] = {}  # header -> values that bindings ask for
        for name in sorted(exchanges):
            for binding in exchanges[name].bindings:
                for header, value in binding.headers:
                    self._asked.setdefault(header, set()).update(() if value is None else (value.encode(),))
        self._route = lru_cache(maxsize=ANSWERS_MAX)(self._walk)

    def route(self, exchange: str, routing_key: str, headers: Pairs = ()) -> tuple[str, ...]:
        """The topics that a record reaches, each once, by name. Raises UnknownExchange.

        Of several headers with one name the last one counts.
        """
        if exchange not in self.exchanges:
            raise UnknownExchange(f"exchange: {exchange!r:.200} does not exist", field="exchange", exchange=exchange)
        return self._route(exchange, routing_key, self._present(headers) if self._asked else ())

    def _present(self, headers: Pairs) -> Present:
        """What bindings can tell apart: of any other value only that it is there. So few answers serve many records."""
        present: dict[str, bytes | None] = {}
        for name, value in headers:
            asked = self._asked.get(name)
            if asked is not None:
                present[name] = value if value in asked else None
        return tuple(sorted(present.items(), key=lambda item: item[0]))

    def _walk(self, exchange: str, routing_key: str, present: Present) -> tuple[str, ...]:
        topics: set[str] = set()
        seen = {exchange}  # bindings make no cycles, but many ways may lead to one exchange
        ahead = deque([exchange])
        while ahead:
            name = ahead.popleft()
            taken = list(self._match(name)(routing_key, present))
            topics.update(binding.target for binding in taken if not binding.to_exchange)
            onward = [binding.target for binding in taken if binding.to_exchange]
            if not taken and (alternate := self.exchanges[name].alternate):
                onward.append(alternate)
            for target in onward:
                if target not in seen and target in self.exchanges:
                    seen.add(target)
                    ahead.append(target)
        return tuple(sorted(topics))

    def _match(self, name: str) -> Match:
        known = self._matches.get(name)
        if known is None:
            known = self._matches[name] = (self.exchanges[name], _compiled(self.exchanges[name]))
        return known[1]


def _compiled(exchange: ExchangeMeta) -> Match:
    """The rule of one exchange, prepared for many records."""
    bindings = exchange.bindings
    if exchange.type == FANOUT:
        return lambda key, present: bindings
    if exchange.type == DIRECT:
        by_key: dict[str, list[BindingMeta]] = {}
        for binding in bindings:
            by_key.setdefault(binding.routing_key, []).append(binding)
        return lambda key, present: by_key.get(key, ())
    if exchange.type == TOPIC:
        patterns = TopicPatterns([binding.routing_key for binding in bindings])
        return lambda key, present: [bindings[number] for number in patterns.matching(key)]
    asking = [(binding, [(n, None if v is None else v.encode()) for n, v in binding.headers]) for binding in bindings]

    def having(key: str, present: Present) -> list[BindingMeta]:
        record = dict(present)
        return [binding for binding, wanted in asking if _has(record, wanted, binding.match == MATCH_ANY)]

    return having


def _has(record: Mapping[str, bytes | None], wanted: Sequence[tuple[str, bytes | None]], one_is_enough: bool) -> bool:
    found = (name in record and (value is None or record[name] == value) for name, value in wanted)
    return any(found) if one_is_enough else all(found)
