"""docs/deployment.md as it stands: each host has a network of its own, its address, and a folder; and its cable is cut.

The commands are the page's, run on the hosts that it names, with the addresses and ports that it shows. Nothing goes
from one host to another but by the network, and the files that the page has copied.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from hosts import Network, lacking, network

PAGE = (Path(__file__).parents[2] / "docs" / "deployment.md").read_text(encoding="utf-8")
NODES = {
    f"node{number}": f"10.0.{site}.1{place}"
    for number, site, place in ((1, 1, 1), (2, 2, 1), (3, 3, 1), (4, 1, 2), (5, 2, 2), (6, 3, 2))
}
"""Where the page's first node is, and the others like it over three sites. The last one comes later."""
FIRST = [name for name in NODES if name != "node6"]
BALANCER = "bal"
DESK = "desk"
"""Where the operator sits, and the administrator, who brings the cluster what the operator signed."""
CLIENTS = ("shop", "admin-1")
COMMAND_S = 180.0
START_S = 90.0


def section(title: str) -> str:
    found = re.search(rf"^## {re.escape(title)}$(.*?)(?=^## |\Z)", PAGE, flags=re.MULTILINE | re.DOTALL)
    assert found, title
    return found[1]


def command(text: str, begins: str) -> str:
    """The one line of a part of the page that begins so, without its remark."""
    lines = {line.partition("   #")[0].strip() for line in text.splitlines() if line.startswith(begins)}
    assert len(lines) == 1, (begins, lines)
    return lines.pop()


class Guide:
    """Who follows the page."""

    def __init__(self, net: Network, logs: Path) -> None:
        self.net = net
        self.logs = logs
        self.pin = ""
        self.serving: dict[str, subprocess.Popen[bytes]] = {}
        programs = str(Path(sys.executable).parent)
        kept = {name: value for name, value in os.environ.items() if not name.startswith("KEYQUORUM_")}
        self.environment = kept | {
            "PATH": f"{programs}{os.pathsep}{os.environ['PATH']}",
            "KEYQUORUM_OPERATOR_PASSPHRASE": "correct horse battery",
        }

    def home(self, member: str) -> str:
        """The host on which a member lives."""
        return DESK if member in ("alice", "admin-1") else member

    def folder(self, member: str) -> Path:
        return self.net.hosts[self.home(member)].folder

    def do(self, member: str, line: str, config: str = "") -> str:
        """Have a line of the page done on the member's host."""
        own = {"KEYQUORUM_CONFIG": str(self.folder(member) / config)} if config else {}
        return self.net.hosts[self.home(member)].run(line.split(), self.environment | own, COMMAND_S)

    def copy(self, file: str, source: str, target: str) -> None:
        """Carry a file from one host to another, as the page says."""
        if self.home(source) != self.home(target):
            shutil.copy(self.folder(source) / file, self.folder(target) / file)

    def make_node(self, name: str) -> None:
        number = name.removeprefix("node")
        line = command(section("1. Make the members, each on its own host"), "keyquorum init node ")
        site = NODES[name].split(".")[2]
        pins = self.folder(name) / "run-keyquorum-pins"  # the page's is the machine's own
        pins.mkdir(mode=0o700)
        for old, new in (
            ("10.0.1.11", NODES[name]), ("node1", name), ("site1", f"site{site}"), ("host1", f"host{number}"),
            ("/run/keyquorum-pins", str(pins)),
        ):  # fmt: skip
            line = line.replace(old, new)
        self.do(name, line)

    def join(self, member: str) -> None:
        self.copy("cluster.manifest", "alice", member)
        line = command(section("3. Join"), "keyquorum cluster join ").replace("node1", member)
        self.do(member, re.sub(r"--pin \w+", f"--pin {self.pin}", line))

    def start(self, member: str) -> None:
        part = section("4. Start")
        if member == BALANCER:
            line = command(part, "python -m balancer ")
        else:
            checked = command(part, "python -m nodes --config node1/node.toml --check-config").replace("node1", member)
            assert "good" in self.do(member, checked)
            line = checked.replace(" --check-config", "")
        host = self.net.hosts[member]
        with (self.logs / f"{member}.log").open("ab") as log:
            self.serving[member] = subprocess.Popen(
                host.command(["setpriv", "--pdeathsig", "TERM", *line.split()]),
                cwd=host.folder,
                env=self.environment,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
            )

    def end(self) -> None:
        for process in self.serving.values():
            process.terminate()
        for process in self.serving.values():
            try:
                process.wait(30)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()

    def until(self, what: Callable[[], bool], seconds: float) -> None:
        """Ask again and again, each time by a command, until it is so."""
        end_s = time.monotonic() + seconds
        while not what():
            for member, process in self.serving.items():
                assert process.poll() is None, (self.logs / f"{member}.log").read_text(errors="replace")[-3000:]
            assert time.monotonic() < end_s


@pytest.fixture
def guide(tmp_path: Path) -> Iterator[Guide]:
    if reason := lacking():
        pytest.skip(f"THE INSTALL GUIDE WAS NOT TRIED OVER A NETWORK: {reason}")
    addresses = {DESK: "10.0.0.2", BALANCER: "10.0.0.5", "shop": "10.0.0.9", **NODES}
    with network(addresses, tmp_path / "hosts") as net:
        made = Guide(net, tmp_path)
        try:
            yield made
        finally:
            made.end()


def answering(guide: Guide) -> int:
    """How many members the administrator's status has."""
    told = guide.do("admin-1", "keyquorum status -o json", "admin-1/client.toml")
    return sum(each["up"] and each["ready"] for each in json.loads(told)["members"])


def test_the_page_makes_a_cluster_of_hosts(guide: Guide) -> None:
    """Steps 1 to 5; then a site's cables are pulled and put back; a node comes and another goes, as under Later."""
    part = section("1. Make the members, each on its own host")
    guide.do("alice", command(part, "keyquorum init operator "))
    for name in FIRST:
        guide.make_node(name)
    guide.do(BALANCER, command(part, "keyquorum init balancer "))
    for name in CLIENTS:
        guide.do(name, command(part, f"keyquorum init client {name} "))

    part = section("2. Sign the manifest")
    (policy,) = re.findall(r"```toml\n(# policy.toml\n.*?)```", part, flags=re.DOTALL)
    (guide.folder("alice") / "policy.toml").write_text(policy)
    for member in (*FIRST, BALANCER, *CLIENTS):
        file = f"{member}.card"
        found = list(guide.folder(member).rglob(file))
        assert len(found) == 1, found
        shutil.copy(found[0], guide.folder(member) / file) if found[0].parent != guide.folder(member) else None
        guide.copy(file, member, "alice")
    guide.do("alice", command(part, "keyquorum cluster sign "))
    shown = guide.do("alice", command(part, "keyquorum cluster show cluster.manifest"))
    (guide.pin,) = set(re.findall(r"\b[0-9a-f]{64}\b", shown))

    for member in (*FIRST, BALANCER, *CLIENTS):
        guide.join(member)
    for member in (*FIRST, BALANCER):
        guide.start(member)
    guide.until(lambda: answering(guide) == len(FIRST) + 1, START_S)

    part = section("5. Use it")
    guide.do("admin-1", command(part, "keyquorum key create "), "admin-1/client.toml")
    (guide.folder("shop") / "report.pdf").write_bytes(b"the report")
    guide.do("shop", command(part, "keyquorum encrypt "), "shop/client.toml")
    decrypt = command(part, "keyquorum decrypt ")

    def decrypted() -> bool:
        (guide.folder("shop") / "report.pdf").unlink(missing_ok=True)
        guide.do("shop", decrypt, "shop/client.toml")
        return (guide.folder("shop") / "report.pdf").read_bytes() == b"the report"

    assert decrypted()
    site = [name for name in FIRST if NODES[name].startswith("10.0.1.")]
    for name in site:
        guide.net.cut(name)
    assert decrypted(), "with a whole site cut off"
    for name in site:
        guide.net.cut(name, healed=True)
    guide.until(lambda: answering(guide) == len(FIRST) + 1, START_S)

    part = section("Later")
    guide.make_node("node6")
    shutil.copy(next(guide.folder("node6").rglob("node6.card")), guide.folder("alice") / "node6.card")
    guide.do("alice", command(part, "keyquorum node add --operator alice"))
    guide.join("node6")
    guide.start("node6")
    guide.until(lambda: answering(guide) == len(FIRST) + 2, START_S)
    guide.do("alice", command(part, "keyquorum node drain node2"))
    guide.do("alice", command(part, "keyquorum node remove node2"))
    assert decrypted()
    assert answering(guide) == len(FIRST) + 1
