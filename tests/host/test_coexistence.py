"""NAT beside the packet filters of others: found, named, and let through, shown with packets."""

from __future__ import annotations

import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import closing

import pytest

from banger_root.errors import HelperError
from banger_root.leases import Leases
from banger_root.validate import LeasePlan
from host.conftest import build_plan
from host.namespace import census, run
from host.outside import WORLD, World, line_of
from host.test_nat import SERVER
from host.test_traffic import SYN_ACK, answers, start_guest
from patience import PATIENCE_S

pytestmark = pytest.mark.host

Prepared = Callable[..., LeasePlan]

# As iptables-nft writes what Docker asks of it.
DOCKER = """
table ip filter {
  chain DOCKER-USER { }
  chain DOCKER-FORWARD {
    oifname "docker0" ct state established,related counter accept
    iifname "docker0" counter accept
  }
  chain FORWARD {
    type filter hook forward priority filter; policy drop;
    counter jump DOCKER-USER
    counter jump DOCKER-FORWARD
  }
}
"""
UFW = """
table ip filter {
  chain ufw-before-forward {
    ct state related,established counter accept
    icmp type echo-request counter accept
    counter jump ufw-user-forward
  }
  chain ufw-user-forward { }
  chain FORWARD {
    type filter hook forward priority filter; policy drop;
    counter jump ufw-before-forward
  }
}
"""
FIREWALLD = """
table inet firewalld {
  chain filter_FORWARD {
    type filter hook forward priority filter + 10; policy accept;
    ct state { established, related } accept
    ct status dnat accept
    iifname "lo" accept
    ct state invalid drop
    jump filter_FORWARD_ZONES
    reject with icmpx admin-prohibited
  }
  chain filter_FORWARD_ZONES {
    iifname "lan0" goto filter_FWD_public
    goto filter_FWD_public
  }
  chain filter_FWD_public {
    jump filter_FWD_public_allow
  }
  chain filter_FWD_public_allow { }
}
"""
PLAIN = """
table inet filter {
  chain forward {
    type filter hook forward priority filter; policy drop;
  }
}
"""
# Ruleset, its table as it is named, the first words of the command, and what that command does
# to the ruleset; None: it is run.
OTHERS = {
    "ufw": (
        UFW,
        "ip filter",
        "sudo ufw route allow in on br-fc-t1",
        'add rule ip filter ufw-user-forward iifname "br-fc-t1" counter accept',
    ),
    "firewalld": (
        FIREWALLD,
        "inet firewalld",
        "sudo firewall-cmd --permanent --zone=trusted --add-interface=br-fc-t1 ",
        "add chain inet firewalld filter_FWD_trusted { accept; }\n"
        'insert rule inet firewalld filter_FORWARD_ZONES iifname "br-fc-t1" '
        "goto filter_FWD_trusted",
    ),
    "plain": (PLAIN, "inet filter", "sudo nft 'insert rule inet filter forward ", None),
}


def nft(text: str) -> None:
    done = subprocess.run(["nft", "-f", "-"], input=text, text=True, capture_output=True)
    assert done.returncode == 0, done.stderr


@pytest.fixture
def world(namespace: None) -> Iterator[World]:
    with closing(World()) as world:
        server = world.python(SERVER)
        assert line_of(server.stdout) == "listening"
        yield world


def connects(plan: LeasePlan) -> bool:
    """Whether the world takes up a connection of the guest, sooner or later."""
    with closing(start_guest(plan)) as guest:
        guest.settle()
        guest.send(guest.syn(WORLD, 9000))
        deadline = time.monotonic() + PATIENCE_S
        while not answers(guest.settle(), SYN_ACK):
            if time.monotonic() > deadline:
                return False
        return True


def stays_outside(plan: LeasePlan) -> bool:
    """Whether the world takes up no connection of the guest."""
    with closing(start_guest(plan)) as guest:
        guest.settle()
        guest.send(guest.syn(WORLD, 9000))
        # Twice there and back: the world's answer takes the same way as the second ping's.
        return not any(answers(guest.settle(), SYN_ACK) for _ in range(2))


@pytest.mark.parametrize("who", OTHERS)
def test_filter_that_drops_is_named_with_a_command_that_then_works(
    leases: Leases, prepared: Prepared, world: World, who: str
) -> None:
    ruleset, table, command, effect = OTHERS[who]
    nft(ruleset)
    before = census()
    with pytest.raises(HelperError) as caught:
        prepared(2, nat=True)
    assert f"nft table {table}," in caught.value.message
    assert caught.value.reason == "forward_dropped"
    assert (caught.value.hint or "").startswith(command)
    assert census() == before
    plan = prepared(3)
    (obstacle,) = leases.status()["obstacles"]
    assert f"{obstacle['family']} {obstacle['table']}" == table
    assert obstacle["command"] == caught.value.hint
    if effect is None:
        subprocess.run(["sh", "-ec", obstacle["command"].removeprefix("sudo ")], check=True)
    else:
        nft(effect)
    assert leases.status()["obstacles"] == []
    leases.release(plan.vm_id)
    assert connects(prepared(2, nat=True))
    leases.release(leases.status()["leases"][0]["id"])
    nft(f"delete table {table}")


def test_lease_without_nat_does_not_mind_a_filter(prepared: Prepared, leases: Leases) -> None:
    nft(PLAIN)
    leases.release(prepared(2).vm_id)
    nft("delete table inet filter")


@pytest.mark.parametrize(
    "rule",
    [
        'iifname "br-fc-*" oifname "lan0" accept',
        "ip saddr 172.31.0.0/16 accept",
        'iifname != "lan0" accept',
        "accept",
    ],
)
def test_filter_that_lets_the_bridge_through_is_no_obstacle(
    leases: Leases, prepared: Prepared, rule: str
) -> None:
    nft(f"{PLAIN}\nadd rule inet filter forward {rule}")
    leases.release(prepared(2, nat=True).vm_id)
    nft("delete table inet filter")


def test_filter_that_accepts_is_no_obstacle(leases: Leases, prepared: Prepared) -> None:
    nft(PLAIN.replace("policy drop", "policy accept") + "add rule inet filter forward ct state "
        'invalid drop\nadd rule inet filter forward iifname "docker0" drop')  # fmt: skip
    leases.release(prepared(2, nat=True).vm_id)
    nft("delete table inet filter")


def test_dockers_chain_gets_one_pair_that_goes_with_the_last_lease(
    leases: Leases, prepared: Prepared, world: World
) -> None:
    nft(DOCKER)
    chain = "nft list chain ip filter DOCKER-USER"
    empty = run(chain)
    plans = prepared(2, nat=True), prepared(3, nat=True)
    assert run(chain).count('comment "banger br-fc-t1"') == 2
    assert connects(plans[0])
    leases.release(plans[0].vm_id)
    assert run(chain).count('comment "banger br-fc-t1"') == 2
    # The same when NAT is taken from a lease that stays.
    leases.prepare(build_plan(3, vm_id=plans[1].vm_id))
    assert run(chain) == empty
    leases.release(plans[1].vm_id)
    assert run(chain) == empty
    nft("delete table ip filter")


def test_docker_that_comes_later_is_told_and_then_opened(
    leases: Leases, prepared: Prepared, world: World
) -> None:
    plan = prepared(2, nat=True)
    assert connects(plan)
    nft(DOCKER)
    assert stays_outside(plan)
    (obstacle,) = leases.status()["obstacles"]
    assert obstacle["command"].startswith("sudo iptables -I DOCKER-USER -i br-fc-t1 ")
    leases.sweep()
    assert leases.status()["obstacles"] == []
    assert connects(plan)
    leases.release(plan.vm_id)
    nft("delete table ip filter")
