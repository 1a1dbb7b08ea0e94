"""How the ranks find rank 0's store on its host.

Host names are unreliable. Debian's installer maps a host's own name to 127.0.1.1, two hosts may have the same name,
and addresses such as a container bridge's exist on every host. So rank 0 sends all its addresses, the others try them
one by one, and the server that answers must know the run's incarnation.

Example: rank 0 is on `node0` with the addresses 10.0.0.5 and 172.17.0.1, the latter that of a container bridge, and
its store has port 40001. A rank on `node1` tries `node0:40001`, 10.0.0.5:40001 and 172.17.0.1:40001. The last is its
own host; if some store answers there, it lacks the key of this incarnation, and the rank goes to the next address. A
rank in the same network namespace as rank 0 tries only 127.0.0.1.
"""

from __future__ import annotations

import ipaddress
import os
import socket
import time
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import timedelta
from functools import partial
from pathlib import Path

import psutil
from torch.distributed import TCPStore  # type: ignore[attr-defined]

from hydra_ckpt.distributed.courier import bounded

LOOPBACK = "127.0.0.1"
_MOST_S = 60.0
# A firewall that drops packets must not use up the time needed for other addresses.
_ATTEMPT_S = 5.0
_BETWEEN_ROUNDS_S = 0.2
_PROC = Path("/proc")


@dataclass(frozen=True)
class RankAddress:
    """Where rank 0's store is. Plain data.

    Attributes:
        name: The host's name.
        network: Equal for processes that reach each other through the loopback; empty if unknown.
        addresses: The host's addresses, without those of the loopback.
        port: The store's port.
        incarnation: A key of that store.
    """

    name: str
    network: str
    addresses: tuple[str, ...]
    port: int
    incarnation: str

    @classmethod
    def here(cls, port: int, incarnation: str) -> RankAddress:
        """The place of a store on this host."""
        return cls(socket.gethostname(), network_of_this_process(), tuple(addresses_of_this_host()), port, incarnation)


@dataclass(frozen=True)
class Reached:
    """How a rank has reached rank 0.

    Attributes:
        store: The connection.
        address: The address at which this rank reached rank 0.
        own: This rank's own address on that connection.
    """

    store: TCPStore
    address: str
    own: str


class UnreachableError(Exception):
    """No address of rank 0 leads to its store; the text lists them with the reasons."""


def network_of_this_process() -> str:
    """Equal for processes that share a loopback: boot ID and network namespace; empty if unknown."""
    try:
        boot = (_PROC / "sys/kernel/random/boot_id").read_text().strip()
        return f"{boot} {(_PROC / 'self/ns/net').stat().st_ino}"
    except OSError:
        return ""


def addresses_of_this_host() -> list[str]:
    """The addresses of all network interfaces except the loopback, IPv4 before IPv6."""
    found = [entry for entries in psutil.net_if_addrs().values() for entry in entries]
    texts = [entry.address for family in (socket.AF_INET, socket.AF_INET6) for entry in found if entry.family == family]
    return [text for text in dict.fromkeys(texts) if not _is_local(text)]


def _is_local(text: str) -> bool:
    """Whether an address is only valid on its own host or link: loopback or link-local."""
    try:
        address = ipaddress.ip_address(text.partition("%")[0])
    except ValueError:
        return False
    return address.is_loopback or address.is_link_local


def candidates(place: RankAddress, network: str, master: str | None) -> list[str]:
    """The addresses to try for rank 0, the most likely first.

    Args:
        place: Where rank 0 is.
        network: This process's network; see `network_of_this_process`.
        master: The launcher's MASTER_ADDR, usually rank 0's host.
    """
    if network and network == place.network:
        return [LOOPBACK]
    named = [address for name in (master, place.name) if name for address in _look_up(name, place.port)]
    found = list(dict.fromkeys([*named, *place.addresses]))
    # A name may resolve to this host instead of rank 0's; checking the incarnation finds that out.
    return sorted(found, key=_is_local)


def _look_up(name: str, port: int) -> list[str]:
    """The addresses of a name; none if the name is unknown, or the name server does not answer."""
    try:
        rows = bounded(lambda: socket.getaddrinfo(name, port, type=socket.SOCK_STREAM), _ATTEMPT_S)
    except (OSError, TimeoutError):
        return []
    return [str(row[4][0]) for row in rows]


def reach(place: RankAddress, limit_s: float) -> Reached:
    """Connect to rank 0's store at the first of its addresses that works.

    Args:
        place: Where rank 0 is.
        limit_s: The longest wait, in seconds; capped at a minute.

    Raises:
        UnreachableError: No address works.
    """
    deadline = time.monotonic() + min(limit_s, _MOST_S)
    found = candidates(place, network_of_this_process(), os.environ.get("MASTER_ADDR"))
    reasons: dict[str, str] = {}
    while True:
        for address in found:
            within_s = min(_ATTEMPT_S, deadline - time.monotonic())
            if within_s <= 0:
                raise UnreachableError(_described(place, found, reasons))
            try:
                reached = bounded(partial(_try, place, address, within_s), within_s)
            except (OSError, RuntimeError) as error:  # a TimeoutError is an OSError
                reasons[address] = str(error) or type(error).__name__
            else:
                # The attempt was short, to leave time for other addresses. From now on there is only this one.
                reached.store.set_timeout(timedelta(seconds=limit_s))
                return reached
        if not found or time.monotonic() + _BETWEEN_ROUNDS_S > deadline:
            raise UnreachableError(_described(place, found, reasons))
        time.sleep(_BETWEEN_ROUNDS_S)


def _try(place: RankAddress, address: str, limit_s: float) -> Reached:
    # The store would keep retrying if nothing listens; a plain connection is refused at once.
    with socket.create_connection((address, place.port), limit_s) as probe:
        own = str(probe.getsockname()[0])
    store = TCPStore(address, place.port, None, is_master=False, timeout=timedelta(seconds=limit_s))
    if not store.check([place.incarnation]):
        raise OSError("another program's store answers at this address")
    return Reached(store, address, own)


def _described(place: RankAddress, tried: Sequence[str], reasons: dict[str, str]) -> str:
    each = "; ".join(f"{address}: {reasons.get(address, 'not tried')}" for address in tried)
    return f"rank 0's store at port {place.port} of {place.name} cannot be reached ({each or 'no address is known'})"
