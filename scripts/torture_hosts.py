"""Pause runs, cut them off and take them over at random moments, on several hosts; see `scripts/torture --hosts`.

Four "hosts" on this machine: namespaces of their own for network, processes and hostname, and clocks that are minutes
apart. Two of them train. In some save rank 0 is paused, or all packets between the two are dropped, for a random time;
or the whole host of rank 0 stops, a run on the two other hosts takes the directory over, and the first wakes up as a
zombie.
After each event the directory is examined from outside, and what the ranks say about each save is compared.

Needs root, iproute2 and iptables.
"""

from __future__ import annotations

import json
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter, defaultdict
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from tests.hosts.network import Host, hosts, why_not

LIMIT_S = 4.0
GROUPS = {
    "write": ("making the draft", "writing the token", "writing its part"),
    "manifest to rename": ("writing the manifest", "publishing"),
    "rename to pointer": ("having published", "moving LATEST"),
    "retention": ("retiring",),
}
KINDS = ("pause", "partition", "zombie")
# The start, the event, the waits of a save, the next vote and the farewell, on a busy machine.
_PATIENCE_S = 6 * LIMIT_S + 40.0


@dataclass(frozen=True)
class Life:
    """What one rank of one life is told.

    Attributes:
        root: The checkpoint directory.
        store: Where the ranks of this life meet.
        rank: This rank.
        log: Where it writes how its saves end.
        saves: How many it makes.
        event: Where something happens to its second save; rank 0 only. None: nowhere.
        victim: Whose packets are dropped; empty: this process is stopped instead.
        flag: The file that says that the event has begun; with a hyphen at its end, that it is over.
    """

    root: str
    store: str
    rank: int
    log: str
    saves: int
    event: str | None
    victim: str
    flag: str


# Runs on each host: imports once, and forks a rank for each line it reads.
AGENT = """
import json, os, signal, sys, time
shift = float(sys.argv[1])
real, real_ns = time.time, time.time_ns
time.time, time.time_ns = lambda: real() + shift, lambda: real_ns() + int(shift * 1e9)
import torch._dynamo
import hydra_ckpt.callback
from scripts import torture_hosts
print("ready", flush=True)
signal.signal(signal.SIGCHLD, signal.SIG_IGN)
for line in sys.stdin:
    told = json.loads(line)
    if "signal" in told:
        try:
            os.kill(told["pid"], told["signal"])
        except ProcessLookupError:
            pass
        continue
    pid = os.fork()
    if pid == 0:
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        torture_hosts.live(torture_hosts.Life(**told))
    print(pid, flush=True)
"""


def live(life: Life) -> None:
    """In a process of its own: one rank of one life."""
    import os

    import torch.distributed as dist

    from hydra_ckpt import CheckpointError
    from hydra_ckpt.checkpointer import Checkpointer
    from hydra_ckpt.store.lease import Times
    from tests.pausing import Meddling, config_of, make_state, outcome_of

    os.setpgid(0, 0)
    os.environ["GLOO_SOCKET_IFNAME"] = "eth0"
    log = Path(life.log)

    def say(**found: Any) -> None:
        with log.open("a") as file:
            file.write(json.dumps({"rank": life.rank, **found}) + "\n")

    def happen() -> None:
        if life.victim:
            _drop("-A", life.victim)
        Path(life.flag).touch()
        if not life.victim:
            os.kill(os.getpid(), signal.SIGSTOP)

    try:
        dist.init_process_group("gloo", init_method=f"file://{life.store}", rank=life.rank, world_size=2)
        files, state = Meddling(happen), make_state()
        config = config_of(Path(life.root), limit_s=LIMIT_S, is_async=True, max_recent_checkpoints=2)
        times = Times(heartbeat_s=0.25, stale_s=2.0, grace_s=1.0, look_s=0.05)
        engine = Checkpointer(config.resolve(), dp_rank=life.rank, tp_rank=0, pp_rank=0, files=files, times=times)
        report = engine.start(state)
        first = report.step + 1 if report is not None else 1
        for number, step in enumerate(range(first, first + life.saves)):
            files.phase = life.event if number == 1 else None
            before = engine.pending
            begun = time.monotonic()
            pending = engine.save(state, step=step)
            if before is not None:
                say(step=step - 1, outcome=outcome_of(before))  # settled by now
            pending.wait()
            say(step=step, outcome=outcome_of(pending), waited_s=time.monotonic() - begun)
        engine.drain()
        engine.close()
        say(end="done")
    except CheckpointError as error:
        say(end=f"{type(error).__name__}: {error}"[:300])
    except BaseException as error:  # noqa: BLE001 - a fork must not continue as its parent
        say(end=f"BUG {type(error).__name__}: {error}"[:300])
    os._exit(0)


def _drop(action: str, address: str) -> None:
    for chain, side in (("INPUT", "-s"), ("OUTPUT", "-d")):
        subprocess.run(["iptables", action, chain, side, address, "-j", "DROP"], check=True)  # noqa: S607 - wherever it is


class Agent:
    """The process on a host that forks ranks."""

    def __init__(self, host: Host, shift_s: float) -> None:
        self.host = host
        self._process = host.start(["-c", AGENT, str(shift_s)], {"TORCH_CPP_LOG_LEVEL": "ERROR"}, own_processes=True)

    def wait(self) -> None:
        """Return when it is ready."""
        assert self._process.stdout is not None
        said = self._process.stdout.readline()
        assert said == "ready\n", (said, self._process.communicate())

    def start(self, life: Life) -> Rank:
        """Fork a rank."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(json.dumps(asdict(life)) + "\n")
        self._process.stdin.flush()
        return Rank(self, int(self._process.stdout.readline()), Path(life.log))

    def signal(self, pid: int, number: int) -> None:
        """Send a signal to a process of this host."""
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps({"pid": pid, "signal": number}) + "\n")
        self._process.stdin.flush()

    def close(self) -> None:
        """End it."""
        self._process.kill()
        self._process.communicate()


@dataclass(frozen=True)
class Rank:
    """A rank that runs on a host.

    Attributes:
        agent: The host's.
        pid: Its number in that host's namespace.
        log: What it says.
    """

    agent: Agent
    pid: int
    log: Path

    def said(self) -> list[dict[str, Any]]:
        """What it has said so far."""
        return [json.loads(line) for line in self.log.read_text().splitlines()] if self.log.exists() else []

    def has_ended(self) -> bool:
        """Whether it has said its last word."""
        return any("end" in row for row in self.said())


class Torture:
    """One directory, many lives.

    Args:
        root: Where everything lies.
        agents: Of the hosts.
        chance: Decides.
    """

    def __init__(self, root: Path, agents: list[Agent], chance: random.Random) -> None:
        self._root, self._agents, self._chance = root, agents, chance
        self._directory = root / "run"
        self._newest = self._number = 0
        self.seen: dict[str, Counter[str]] = defaultdict(Counter)

    def event(self, group: str, kind: str) -> None:
        """Let one thing happen, and see what comes of it."""
        seen, phase = self.seen[group], self._chance.choice(GROUPS[group])
        first, second, *others = self._chance.sample(self._agents, len(self._agents))
        victim = second.host.address if kind == "partition" else ""
        ranks, flag = self._begin([first, second], 4, phase, victim)
        heirs: list[Rank] = []
        if _comes(flag.exists, _PATIENCE_S):
            seen[kind] += 1
            if kind == "zombie":
                heirs, _ = self._begin(others, 3, None, "")
                _comes(lambda: all(rank.has_ended() for rank in heirs), _PATIENCE_S)
            else:
                time.sleep(self._chance.uniform(0.3, 1.8) * LIMIT_S)
            self._end_event(kind, ranks[0], victim)
        else:
            seen["did not happen"] += 1
        self._judge(group, phase, kind, ranks, heirs)

    def _begin(self, agents: list[Agent], saves: int, event: str | None, victim: str) -> tuple[list[Rank], Path]:
        self._number += 1
        scratch = self._root / f"life{self._number}"
        scratch.mkdir()
        flag = scratch / "flag"
        ranks = []
        for rank, agent in enumerate(agents):
            told = (event if rank == 0 else None, victim, str(flag))
            log = str(scratch / f"log{rank}")
            ranks.append(agent.start(Life(str(self._directory), str(scratch / "store"), rank, log, saves, *told)))
        return ranks, flag

    @staticmethod
    def _end_event(kind: str, rank: Rank, victim: str) -> None:
        if kind == "partition":
            for chain, side in (("INPUT", "-s"), ("OUTPUT", "-d")):
                rank.agent.host.run_inside("iptables", "-D", chain, side, victim, "-j", "DROP")
        else:
            rank.agent.signal(rank.pid, signal.SIGCONT)

    def _judge(self, group: str, phase: str, kind: str, ranks: list[Rank], heirs: list[Rank]) -> None:
        from torture import examine

        seen = self.seen[group]
        ended = _comes(lambda: all(rank.has_ended() for rank in [*ranks, *heirs]), _PATIENCE_S)
        rows = [row for rank in ranks for row in rank.said()]
        slow = [row for row in rows if row["rank"] != 0 and row.get("waited_s", 0.0) > 2 * (LIMIT_S + 5.0)]
        seen["hung"] += bool(slow) or not ended
        outcomes: dict[int, set[str]] = defaultdict(set)
        for row in rows:
            if "outcome" in row:
                outcomes[row["step"]].add(row["outcome"])
        unlike = {step: found for step, found in outcomes.items() if {"published", "failed"} <= found}
        seen["published, failed"] += bool(unlike)
        seen["unknown at first"] += any("unknown" in found for found in outcomes.values())
        bugs = [row["end"] for row in rows if row.get("end", "").startswith("BUG")]
        self._newest, wrong = examine(self._directory, self._newest)
        seen["lost"] += bool(wrong) or bool(bugs)
        if slow or not ended or unlike or wrong or bugs:
            print(f"  {kind} in {phase}: slow {slow}, ended {ended}, unlike {unlike}, {wrong}, {bugs}", flush=True)
        for rank in [*ranks, *heirs]:
            if not rank.has_ended():
                rank.agent.signal(rank.pid, signal.SIGKILL)


def _comes(happens: Any, within_s: float) -> bool:
    deadline = time.monotonic() + within_s
    while not happens():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.05)
    return True


@contextmanager
def _agents(chance: random.Random) -> Iterator[list[Agent]]:
    with hosts(["alpha", "beta", "beta", "delta"]) as made, ExitStack() as stack:  # two of one name
        found = [Agent(host, chance.uniform(-300.0, 300.0)) for host in made]
        for agent in found:
            stack.callback(agent.close)
        for agent in found:
            agent.wait()
        yield found


def main(events: int, seconds: float | None, seed: int) -> int:
    """Torture until there were so many events, or for so long; print a table. Returns 1 if anything was wrong."""
    if why_not():
        print(f"no hosts can be made here: {why_not()}")
        return 2
    chance = random.Random(seed)  # noqa: S311 - moments, no secrets
    deadline = None if seconds is None else time.monotonic() + seconds
    with tempfile.TemporaryDirectory(prefix="hydra_ckpt_hosts_") as root, _agents(chance) as agents:
        torture = Torture(Path(root), agents, chance)
        for number in range(events):
            if deadline is not None and time.monotonic() > deadline:
                break
            torture.event(list(GROUPS)[number % len(GROUPS)], chance.choice(KINDS))
        return _print(torture.seen)


def _print(seen: dict[str, Counter[str]]) -> int:
    titles = [*KINDS, "did not happen", "unknown at first", "lost", "hung", "published, failed"]
    print(f"{'phase':20s}" + "".join(f"{title:>19s}" for title in titles))
    for group in GROUPS:
        print(f"{group:20s}" + "".join(f"{seen[group][title]:19d}" for title in titles), flush=True)
    return int(any(found[title] for found in seen.values() for title in ("lost", "hung", "published, failed")))
