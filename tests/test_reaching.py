"""Which addresses a rank tries for rank 0, and how it recognizes it; for several hosts, see tests/hosts."""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from torch.distributed import TCPStore

from hydra_ckpt.distributed.reaching import (
    RankAddress,
    UnreachableError,
    addresses_of_this_host,
    candidates,
    network_of_this_process,
    reach,
)

PLACE = RankAddress("localhost", "boot 1", ("10.1.2.3", "192.168.7.7", "fd00::7"), 29500, "incarnation")


def test_ranks_that_share_a_network_use_the_loopback() -> None:
    assert candidates(PLACE, "boot 1", "10.9.9.9") == ["127.0.0.1"]


def test_a_rank_elsewhere_tries_the_launchers_address_then_the_name_then_all_addresses() -> None:
    unknown = replace(PLACE, name="no-such-host.invalid")
    assert candidates(unknown, "boot 2", "10.9.9.9") == ["10.9.9.9", *PLACE.addresses]
    assert candidates(unknown, "boot 2", None) == list(PLACE.addresses)


def test_an_unknown_network_is_no_network_of_its_own() -> None:
    # Two hosts of which neither says where it is are not one host.
    assert candidates(replace(PLACE, network="", name="no-such-host.invalid"), "", None) == list(PLACE.addresses)


def test_a_name_that_means_this_very_host_comes_last() -> None:
    # localhost stands for a name that the hosts file leads to 127.0.1.1.
    found = candidates(PLACE, "boot 2", "localhost")
    assert found[: len(PLACE.addresses)] == list(PLACE.addresses)
    assert "127.0.0.1" in found[len(PLACE.addresses) :]
    assert len(found) == len(set(found))


def test_a_hosts_own_addresses_are_known_without_its_loopback() -> None:
    found = addresses_of_this_host()
    assert not [address for address in found if address.startswith(("127.", "fe80")) or address == "::1"]
    assert network_of_this_process() == network_of_this_process()


HOSTS_FILE = """
import socket
from tests.test_reaching import PLACE
from dataclasses import replace
from hydra_ckpt.distributed.reaching import candidates
print(candidates(replace(PLACE, name="node7", addresses=("10.1.2.3",)), "boot 2", "node7"))
"""


@pytest.mark.skipif(os.geteuid() != 0 or shutil.which("unshare") is None, reason="a hosts file of one's own needs root")
def test_the_hosts_file_of_debian(tmp_path: Path) -> None:
    (tmp_path / "hosts").write_text("127.0.0.1 localhost\n127.0.1.1 node7\n")
    inside = f'mount --bind {tmp_path}/hosts /etc/hosts && exec "$@"'
    found = subprocess.run(
        ["unshare", "--mount", "sh", "-c", inside, "sh", sys.executable, "-c", HOSTS_FILE],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "PYTHONPATH": str(Path(__file__).parent.parent)},
    )
    if "mount:" in found.stderr:
        pytest.skip("this system lets nobody mount a hosts file")
    assert found.stdout.strip() == "['10.1.2.3', '127.0.1.1']", found.stderr


# -- what answers --------------------------------------------------------------------------------------------------


@pytest.fixture
def store() -> TCPStore:
    found = TCPStore("0.0.0.0", 0, None, is_master=True, wait_for_workers=False)
    found.set("incarnation", "1")
    return found


@pytest.fixture
def silent() -> Iterator[int]:
    """The port of a program that takes connections and says nothing."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        thread = threading.Thread(target=_take, args=(server,), daemon=True)
        thread.start()
        yield server.getsockname()[1]


def _take(server: socket.socket) -> None:
    taken = []
    while True:
        try:
            taken.append(server.accept())
        except OSError:
            return


def test_rank_0_is_reached_through_the_loopback(store: TCPStore) -> None:
    place = RankAddress("here", network_of_this_process(), (), store.port, "incarnation")
    reached = reach(place, 20.0)
    assert (reached.address, reached.own) == ("127.0.0.1", "127.0.0.1")
    assert reached.store.get("incarnation") == b"1"


def test_rank_0_is_reached_by_the_address_that_works(store: TCPStore) -> None:
    # 192.0.2.0/24 is nobody's: refused, unreachable or without an answer, as the system likes it.
    place = RankAddress("no-such-host.invalid", "elsewhere", ("192.0.2.1", "127.0.0.1"), store.port, "incarnation")
    assert reach(place, 30.0).address == "127.0.0.1"


def test_another_programs_store_is_not_taken_for_rank_0s(store: TCPStore) -> None:
    place = RankAddress("no-such-host.invalid", "elsewhere", ("127.0.0.1",), store.port, "of another run")
    with pytest.raises(UnreachableError, match=r"127\.0\.0\.1: another program's store answers at this address"):
        reach(place, 1.0)


def test_a_program_that_says_nothing_ends_at_the_limit(silent: int) -> None:
    place = RankAddress("no-such-host.invalid", "elsewhere", ("127.0.0.1",), silent, "incarnation")
    with pytest.raises(UnreachableError, match=f"rank 0's store at port {silent} of no-such-host.invalid"):
        reach(place, 1.5)


def test_a_host_without_an_address_is_said_so() -> None:
    with pytest.raises(UnreachableError, match="no address is known"):
        reach(RankAddress("no-such-host.invalid", "elsewhere", (), 1, "incarnation"), 1.0)
