"""A machine of its own for the workers: a network namespace, whose cable can be pulled."""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
from collections.abc import Iterator

HOST, GUEST = "10.213.7.1", "10.213.7.2"
#: Both, as PostgreSQL's access list has it.
NETWORK = "10.213.7.0/30"


def missing() -> str | None:
    """What there is not, if anything."""
    if os.geteuid() != 0:
        return "a network of its own takes root"
    if shutil.which("ip") is None:
        return "there is no ip (Debian's iproute2)"
    return None


def ip(*arguments: str) -> None:
    subprocess.run(["ip", *arguments], check=True, capture_output=True)


class Network:
    """:param name: of the namespace."""

    def __init__(self, name: str) -> None:
        self.name = name
        #: The host's end of the cable.
        self.link = f"v{os.getpid()}"

    @property
    def prefix(self) -> tuple[str, ...]:
        """What lets a command run there."""
        return ("ip", "netns", "exec", self.name)

    def cut(self) -> None:
        """From now on nothing comes through, and nobody is told."""
        ip("link", "set", self.link, "down")

    def mend(self) -> None:
        ip("link", "set", self.link, "up")


@contextlib.contextmanager
def network() -> Iterator[Network]:
    made = Network(f"chaos-{os.getpid()}")
    ip("netns", "add", made.name)
    try:
        peer = f"{made.link}p"
        ip("link", "add", made.link, "type", "veth", "peer", "name", peer, "netns", made.name)
        ip("address", "add", f"{HOST}/30", "dev", made.link)
        made.mend()
        for arguments in (
            ("address", "add", f"{GUEST}/30", "dev", peer),
            ("link", "set", peer, "up"),
            ("link", "set", "lo", "up"),
        ):
            ip("-netns", made.name, *arguments)
        yield made
    finally:
        ip("netns", "delete", made.name)  # the cable goes with it
