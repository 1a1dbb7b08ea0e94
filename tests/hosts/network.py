"""Several "hosts" on one machine: network namespaces joined by a bridge, each with a hostname and a hosts file."""

from __future__ import annotations

import itertools
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest

from hydra_ckpt.testing.processes import PATIENCE

REPOSITORY = Path(__file__).parent.parent.parent
INTERFACE = "eth0"
_numbers = itertools.count()


def why_not() -> str:
    """Why no hosts can be made here; empty where they can."""
    if os.geteuid() != 0:
        return "network namespaces need root"
    missing = [name for name in ("ip", "iptables", "unshare") if shutil.which(name) is None]
    if missing:
        return f"not installed: {', '.join(missing)} (Debian: iproute2, iptables, util-linux)"
    probe = f"probe{os.getpid()}"
    made = subprocess.run(["ip", "netns", "add", probe], capture_output=True, check=False)
    subprocess.run(["ip", "netns", "del", probe], capture_output=True, check=False)
    return "" if made.returncode == 0 else f"no network namespaces here ({made.stderr.decode().strip()})"


needs_hosts = pytest.mark.skipif(bool(why_not()), reason=why_not())


def _run(*command: str) -> None:
    subprocess.run(command, check=True, capture_output=True)


@dataclass(frozen=True)
class Host:
    """One of the hosts.

    Attributes:
        namespace: Its network namespace.
        name: Its hostname.
        address: Its address.
    """

    namespace: str
    name: str
    address: str

    def start(
        self, arguments: Sequence[str], environment: Mapping[str, str] = {}, *, own_processes: bool = False
    ) -> subprocess.Popen[str]:
        """Start this interpreter on the host, with arguments.

        Args:
            arguments: What comes after the interpreter's name.
            environment: Variables to set.
            own_processes: Whether it sees no process but its own, as on another host or in a container.
        """
        kinds = ["--uts", *(["--pid", "--fork", "--mount-proc", "--kill-child"] if own_processes else [])]
        command = ["ip", "netns", "exec", self.namespace, "unshare", *kinds, "sh", "-c"]
        command += [f'hostname {self.name} && exec "$@"', "sh", sys.executable, *arguments]
        kept = {key: value for key, value in os.environ.items() if not key.startswith(("MASTER_", "RANK", "WORLD_"))}
        everything = {**kept, "PYTHONPATH": str(REPOSITORY), "OMP_NUM_THREADS": "1", **environment}
        pipe = subprocess.PIPE
        return subprocess.Popen(
            command,
            env=everything,
            cwd=REPOSITORY,
            stdin=pipe,
            stdout=pipe,
            stderr=pipe,
            text=True,
            start_new_session=True,  # or a launcher that ends its process group ends the test as well
        )

    def run_inside(self, *command: str) -> None:
        """Run a command in the host's network."""
        _run("ip", "netns", "exec", self.namespace, *command)


@contextmanager
def hosts(names: Sequence[str], hosts_files: Mapping[int, str] | None = None) -> Iterator[list[Host]]:
    """Make hosts; they are gone afterwards.

    Args:
        names: Their hostnames, which may be equal.
        hosts_files: Number of a host to its hosts file; the others have one that names all of them.
    """
    label = f"hk{os.getpid()}x{next(_numbers)}"
    bridge = f"{label}b"
    made = [Host(f"{label}n{number}", name, f"10.77.0.{number + 1}") for number, name in enumerate(names)]
    usual = "127.0.0.1 localhost\n" + "".join(f"{host.address} {host.name}\n" for host in made)
    try:
        _run("ip", "link", "add", bridge, "type", "bridge")
        _run("ip", "link", "set", bridge, "up")
        for number, host in enumerate(made):
            _add(host, bridge, f"{label}v{number}")
            directory = Path("/etc/netns") / host.namespace
            directory.mkdir(parents=True)
            (directory / "hosts").write_text((hosts_files or {}).get(number, usual))
            (directory / "resolv.conf").write_text("options timeout:1 attempts:1\n")
        yield made
    finally:
        for number, host in enumerate(made):
            subprocess.run(["ip", "link", "del", f"{label}v{number}"], check=False, capture_output=True)
            subprocess.run(["ip", "netns", "del", host.namespace], check=False, capture_output=True)
            shutil.rmtree(Path("/etc/netns") / host.namespace, ignore_errors=True)
        subprocess.run(["ip", "link", "del", bridge], check=False, capture_output=True)


def _add(host: Host, bridge: str, cable: str) -> None:
    _run("ip", "netns", "add", host.namespace)
    _run("ip", "link", "add", cable, "type", "veth", "peer", "name", INTERFACE, "netns", host.namespace)
    _run("ip", "link", "set", cable, "master", bridge, "up")
    inside = ["ip", "-n", host.namespace]
    _run(*inside, "addr", "add", f"{host.address}/24", "dev", INTERFACE)
    _run(*inside, "link", "set", INTERFACE, "up")
    _run(*inside, "link", "set", "lo", "up")


@dataclass
class Ended:
    """A rank that has ended.

    Attributes:
        code: Its exit code; negative for a signal.
        out: What it printed.
        err: What it printed as errors.
    """

    code: int
    out: str
    err: str


def run_ranks(
    made: Sequence[Host], program: str, *arguments: str, timeout_s: float = 60.0, environment: Mapping[str, str] = {}
) -> list[Ended]:
    """Run a program as one rank on each host; RANK, WORLD_SIZE and STORE say how they find each other.

    Raises:
        AssertionError: A rank does not end within the time.
    """
    with tempfile.TemporaryDirectory() as scratch:
        processes = [
            host.start(
                ["-c", program, *arguments],
                {"RANK": str(rank), "WORLD_SIZE": str(len(made)), "STORE": f"{scratch}/store", **environment},
            )
            for rank, host in enumerate(made)
        ]
        return collect(processes, timeout_s)


def collect(processes: Sequence[subprocess.Popen[str]], timeout_s: float) -> list[Ended]:
    """Wait for processes; those that do not end in time are killed."""
    ended = []
    late = []
    for rank, process in enumerate(processes):
        try:
            out, err = process.communicate(timeout=timeout_s * PATIENCE)
        except subprocess.TimeoutExpired:
            process.kill()
            out, err = process.communicate()
            late.append(f"rank {rank} did not end in time:\n{out}\n{err}")
        ended.append(Ended(process.returncode, out, err))
    assert not late, "\n".join(late)
    return ended
