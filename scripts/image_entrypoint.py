"""First program of a container: give up root, find out the address of this container, then become the service.

Bind mounts belong to root when docker made them, and to whoever made them otherwise. As root, this hands directories
of root to the user 10001, then runs the service as the owner of the data directory. Started as another user
(``docker run --user``), it only starts the service.
"""

import fcntl
import ipaddress
import os
import socket
import struct
import sys

USER = 10001  # no such user on the host; nothing there opens to it by accident
DIRECTORIES = ("/data", "/data/join-tokens", "/join")
SIOCGIFADDR, SIOCGIFNETMASK = 0x8915, 0x891B
NETWORK_ADDRESSES_MAX = 64  # more names than these do not belong into a certificate


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


def own_interface() -> ipaddress.IPv4Interface | None:
    """Address and network of the first interface that is not loopback."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        for _, name in socket.if_nameindex():
            request = struct.pack("256s", name.encode())
            try:
                address = fcntl.ioctl(probe, SIOCGIFADDR, request)[20:24]
                netmask = fcntl.ioctl(probe, SIOCGIFNETMASK, request)[20:24]
            except OSError:
                continue  # no address
            found = ipaddress.IPv4Interface(f"{socket.inet_ntoa(address)}/{socket.inet_ntoa(netmask)}")
            if not found.is_loopback:
                return found
    return None


def advertise() -> None:
    """Let clients find a broker by the address of its container, which they reach from the host and from beside it.

    A container that is made anew may get another address, but its data directory keeps the certificate of the first
    start. So the certificate names every address of a small network: whoever holds it is a broker of this cluster
    all the same.
    """
    interface = own_interface()
    if interface is None:
        return
    port = os.environ.get("FERRYLINE_BROKER_PORT", "9443")
    os.environ.setdefault("FERRYLINE_BROKER_ADVERTISE_EXTERNAL", f"https://{interface.ip}:{port}")
    os.environ.setdefault("FERRYLINE_BROKER_ADVERTISE_INTERNAL", f"https://{socket.gethostname()}:{port}")
    network = interface.network
    names = [interface.ip] if network.num_addresses > NETWORK_ADDRESSES_MAX else network.hosts()
    os.environ.setdefault("FERRYLINE_BROKER_TLS_NAMES", ",".join(str(name) for name in names))


def main(command: list[str]) -> None:
    """Run ``command`` in place of this process, so that it gets the signals of the container."""
    if os.getuid() == 0:
        give_up_root()
    if command[0] == "ferryline-broker":
        advertise()
    os.environ["HOME"] = "/tmp"
    os.execvp(command[0], command)


main(sys.argv[1:])
