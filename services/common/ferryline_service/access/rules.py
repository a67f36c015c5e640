"""What a route or a kind of frame asks of its caller. One table of these for each service; what is not in it fails
the start. Pure.

``PUBLIC``: nobody is asked who they are. ``AUTHENTICATED``: any principal; where the answer is a list, the handler
shows what may be read. ``NODE``: a node of the cluster, by its certificate. Everything else names what is needed.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from ferryline.protocol.access import CLUSTER, MANAGE, READ
from ferryline.protocol.errors import Forbidden, NotReady
from ferryline_service.access.caller import Caller

# Where the name of a resource comes from.
PATH = "path"  # a parameter of the route, of the same name as the resource
BODY = "body"  # "name" in the JSON body
HEADER = "header"  # the header of a frame: the frame is refused whole
ENTRY = "entry"  # each entry of a frame or list is decided by itself
WHOLE = ""  # there is one cluster


@dataclass(frozen=True, slots=True)
class Need:
    """``action`` on the resource that is named at ``source``."""

    action: str
    resource: str
    source: str = WHOLE


@dataclass(frozen=True, slots=True)
class Rule:
    """``who``: "public", "authenticated", "node" or "granted" (all ``needs`` are); "metrics": granted or opened."""

    who: str
    needs: tuple[Need, ...] = ()


PUBLIC = Rule("public")
AUTHENTICATED = Rule("authenticated")
NODE = Rule("node")
METRICS = Rule("metrics", (Need(READ, CLUSTER),))

RouteRules = Mapping[tuple[str, str], Rule]  # (method, path as the router spells it); HEAD follows GET
FrameRules = Mapping[int, Rule]


class RuleMissing(RuntimeError):
    """A route or kind of frame is served that nobody has decided about: the service must not start."""


def granted(*needs: Need) -> Rule:
    """Every one of ``needs`` must be granted."""
    return Rule("granted", needs)


LOOK = granted(Need(READ, CLUSTER))
OPERATE = granted(Need(MANAGE, CLUSTER))
SHARED_ROUTES: RouteRules = {  # of every service
    ("GET", "/healthz"): PUBLIC,
    ("GET", "/readyz"): PUBLIC,
    ("GET", "/openapi.json"): PUBLIC,
    ("GET", "/metrics"): METRICS,
    ("GET", "/v1/session"): AUTHENTICATED,
    ("GET", "/v1/whoami"): AUTHENTICATED,
    ("GET", "/v1/metadata"): AUTHENTICATED,
    ("GET", "/v1/audit"): OPERATE,
    ("GET", "/v1/certificates"): LOOK,
    ("POST", "/v1/certificates/renew"): OPERATE,
}


def check_kind(rule: Rule, caller: Caller) -> None:
    """What can be said of a frame before it is read. Raises Forbidden; NotReady if nobody asked the caller's name."""
    if not caller.name:
        raise NotReady("this session began before it was known who may do what, or its token has ended; open another")
    if rule is NODE:
        raise Forbidden(f"{caller.name} is no node of this cluster", principal=caller.name)


def check_frames(kinds: Iterable[int], rules: FrameRules, service: str) -> None:
    """Raises RuleMissing, naming the kinds that a service handles without a rule."""
    missing = sorted(int(kind) for kind in kinds if kind not in rules)
    if missing:
        raise RuleMissing(f"{service}: no access rule for the kinds {missing}")
