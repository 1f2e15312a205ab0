"""This node in the network: its addresses, a free port, and what to say where others cannot be reached."""

import os
import platform
import random
import socket
from collections.abc import Mapping
from contextlib import suppress

import psutil

from lorafusion.core.schema import shortened
from lorafusion.launch.outcome import FaultyRunError

PORTS = range(20_000, 32_000)  # below those that Linux gives to whoever asks for any
TRIES = 20
INTERFACES = ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME")  # set by the site's `interface`


def addresses() -> dict[str, list[str]]:
    """This node's IPv4 addresses by its interfaces."""
    return {
        name: [address.address for address in every if address.family == socket.AF_INET]
        for name, every in psutil.net_if_addrs().items()
    }


def address_of(environment: Mapping[str, str]) -> str:
    """This node's address: of the interface that gloo or NCCL is to use, else the one from which Slurm starts steps if
    that is here, else the node's name."""
    here = addresses()
    for variable in INTERFACES:
        interface = environment.get(variable, "").partition(",")[0].removeprefix("=")
        if here.get(interface):
            return here[interface][0]
    slurm = environment.get("SLURM_LAUNCH_NODE_IPADDR", "")
    return slurm if any(slurm in every for every in here.values()) else platform.node()


def free_port() -> int:
    """A port that nobody on this node has. It is drawn, so that runs that look at once choose different ones."""
    tried = random.SystemRandom().sample(PORTS, TRIES)
    for port in tried:
        with socket.socket() as probe, suppress(OSError):
            probe.bind(("", port))
            return port
    ports = ", ".join(map(str, tried[:3]))
    raise FaultyRunError("crash", f"rendezvous: none of {TRIES} ports ({ports}, ...) of {platform.node()} is free")


def network_failure(what: str, error: Exception) -> str:
    """Why processes could not reach each other, in a line that says what to try."""
    reason = " ".join(str(error).split()).rstrip(".") or type(error).__name__
    here = [f"{name} {every[0]}" for name, every in addresses().items() if every and name != "lo"]
    used = next(filter(None, map(os.environ.get, INTERFACES)), "none")
    choice = f"{INTERFACES[0]}: {used}; here: {shortened(', '.join(here) or 'none but lo', 50)}"
    return f"{what} failed: {shortened(reason, 120)}; set the site's `interface` ({choice})"
