"""Ranks on several hosts find rank 0, whatever the host names resolve to."""

from __future__ import annotations

import pytest

from tests.hosts.network import hosts, needs_hosts, run_ranks

pytestmark = needs_hosts

# Training's own group is given its interface; ours has to find the way alone.
MEET = """
import os, subprocess, sys
import torch.distributed as dist
os.environ["GLOO_SOCKET_IFNAME"] = "eth0"
dist.init_process_group("gloo", init_method="file://" + os.environ["STORE"],
                        rank=int(os.environ["RANK"]), world_size=int(os.environ["WORLD_SIZE"]))
del os.environ["GLOO_SOCKET_IFNAME"]
if dist.get_rank() == 0 and sys.argv[2:]:
    subprocess.run(sys.argv[2].split(), check=True)
dist.barrier()
from hydra_ckpt import CheckpointError
from hydra_ckpt.distributed.group import Group
from hydra_ckpt.distributed.vote import Vote
try:
    group = Group.create(None, float(sys.argv[1]))
    channel = group.channel("test")
    print(channel.agree("a message", channel.rank + 1, sum), Vote(group, "a vote", 1).ask([channel.rank + 1]))
    channel.farewell()
except CheckpointError as error:
    print(type(error).__name__, error)
sys.stdout.flush()
os._exit(0)
"""
DEBIAN = "127.0.0.1 localhost\n127.0.1.1 {name}\n"


@pytest.mark.parametrize(
    ("names", "files"),
    [
        (["alpha", "beta"], {}),
        (["alpha", "beta"], {0: DEBIAN.format(name="alpha"), 1: DEBIAN.format(name="beta")}),
        # Here rank 0's name leads to this very host, where nobody listens.
        (["same", "same"], {0: DEBIAN.format(name="same"), 1: DEBIAN.format(name="same")}),
        (["same", "same"], {0: "127.0.0.1 localhost\n", 1: "127.0.0.1 localhost\n"}),
    ],
    ids=["a hosts file that names all", "127.0.1.1", "equal names", "no names"],
)
def test_ranks_meet(names: list[str], files: dict[int, str]) -> None:
    with hosts(names, files) as made:
        for ended in run_ranks(made, MEET, "20"):
            assert ended.out.strip() == "3 [2]", ended.err


def test_three_hosts_and_an_address_that_drops_packets_before_the_one_that_works() -> None:
    names = ["alpha", "beta", "gamma"]
    nowhere = "127.0.0.1 localhost\n10.77.0.99 alpha\n"  # nobody is there
    with hosts(names, dict.fromkeys(range(3), nowhere)) as made:
        for ended in run_ranks(made, MEET, "30", environment={"MASTER_ADDR": "alpha"}):
            assert ended.out.strip() == "6 [3]", ended.err


def test_rank_0_that_cannot_be_reached_is_one_clear_error_on_all_ranks() -> None:
    refuse = "iptables -A INPUT -i eth0 -p tcp --syn -j REJECT --reject-with tcp-reset"
    with hosts(["alpha", "beta"]) as made:
        ended = run_ranks(made, MEET, "5", refuse)
        for rank in ended:
            assert rank.out.startswith("CheckpointError rank 1 on beta: rank 0's store at port"), (rank.out, rank.err)
            assert "10.77.0.1: [Errno 111] Connection refused" in rank.out
            assert "Set MASTER_ADDR to an address of rank 0's host" in rank.out


def test_a_rank_0_that_answers_nobody_ends_at_the_limit_too() -> None:
    with hosts(["alpha", "beta"]) as made:
        for rank in run_ranks(made, MEET, "3", "iptables -A INPUT -i eth0 -p tcp --syn -j DROP"):
            assert "rank 1 on beta: rank 0's store at port" in rank.out, rank.err
            assert "10.77.0.1: timed out" in rank.out or "10.77.0.1: no answer within" in rank.out
