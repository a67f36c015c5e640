"""First program of a container: give up root, find out the address of this container, then become the service.

Bind mounts belong to root when docker made them, and to whoever made them otherwise. As root, this hands directories
of root to the user 10001, then runs the service as the owner of the data directory. Started as another user
(``docker run --user``), it only starts the service.
"""

import os
import socket
import sys

USER = 10001  # no such user on the host; nothing there opens to it by accident
DIRECTORIES = ("/data/join-tokens", "/data", "/join", "/access")
ACCESS_FILE, ADMIN_KEY_FILE = "/access/access.toml", "/access/admin.key"


def give_up_root() -> None:
    """Become the owner of /data, which becomes ``USER`` when it was root."""
    for path in DIRECTORIES:
        if os.path.isdir(path) and os.stat(path).st_uid == 0:
            os.chown(path, USER, USER)
    owner = os.stat("/data") if os.path.isdir("/data") else None
    uid, gid = (owner.st_uid, owner.st_gid) if owner else (USER, USER)
    os.setgroups([])
    os.setgid(gid)
    os.setuid(uid)


def advertise() -> None:
    """Let clients find a broker by the address of its container, which they reach from the host and from beside it.

    A container that is made anew may get another address; the broker renews its certificate for it.
    """
    name = socket.gethostname()
    port = os.environ.get("FERRYLINE_BROKER_PORT", "9443")
    os.environ.setdefault("FERRYLINE_BROKER_ADVERTISE_INTERNAL", f"https://{name}:{port}")
    os.environ.setdefault("FERRYLINE_BROKER_ADVERTISE_EXTERNAL", f"https://{socket.gethostbyname(name)}:{port}")


def control_access() -> None:
    """Access control is on where there is an access file: whoever starts the cluster next cannot leave it out.

    The first start with it makes a principal `admin`, whose key is written once, for the owner of the directory only.
    """
    if os.path.exists(ACCESS_FILE):
        os.environ.setdefault("FERRYLINE_COORDINATOR_ACCESS", ACCESS_FILE)
        os.environ.setdefault("FERRYLINE_COORDINATOR_BOOTSTRAP_ADMIN", ADMIN_KEY_FILE)


def advertise_coordinator() -> None:
    """One of several is found by the address of its container, as brokers are; standbys name it to whoever asks."""
    name = socket.gethostname()
    port = os.environ.get("FERRYLINE_COORDINATOR_PORT", "8443")
    os.environ.setdefault("FERRYLINE_COORDINATOR_ADVERTISE", f"https://{socket.gethostbyname(name)}:{port}")


def main(command: list[str]) -> None:
    """Run ``command`` in place of this process, so that it gets the signals of the container."""
    if os.getuid() == 0:
        give_up_root()
    if command[0] == "ferryline-broker":
        advertise()
    if command[0] == "ferryline-coordinator":
        control_access()
    if command[0] == "ferryline-coordinator" and os.environ.get("FERRYLINE_COORDINATOR_STORE") == "etcd":
        advertise_coordinator()
    os.environ["HOME"] = "/tmp"
    os.execvp(command[0], command)


main(sys.argv[1:])
