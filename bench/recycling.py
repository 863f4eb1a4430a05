"""Measures what a node grows by while it loads keys, with and without the renewal of its token.

*In one process*: what a node does with each cold key once its shares are there, with the real parts: a secret in
locked memory, ``Lane.load`` into a SoftHSM token, one operation, a cache of 64 keys that destroys what leaves it, and
the keeper that renews the token; in a process with a node's allocator. No sockets, shares or audit: so a million fit.
*Through a node*: a supervised node process that serves each key once, so that each request of a client over CURVE is a
cold load with grant, gathering and audit; fewer of them. The memory is the resident set of the process that serves.
The controls are the same without renewal, fewer loads, counted out to the same number. Run by ``make bench-recycling``.
"""

from __future__ import annotations

import gc
import json
import os
import subprocess
import sys
import tempfile
import time
import tomllib
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final

import click
from rich.console import Console
from rich.table import Table

import engine
from engine import ALGORITHMS, LocalCluster
from engine.client.config import write_toml
from engine.errors import NeedGrant, TokenError
from engine.protocol.requests import NodeStatus, TokenHealth
from engine.sharing import SecretBuffer
from nodes.allocator import overwriting_environment
from nodes.cache import Cache, CacheLimits
from nodes.config import MODULE_PATHS, PinSource, TokenCare, TokenConfig
from nodes.keeper import Keeper
from nodes.token import LoadedKey, Token, initialize_token

OUTPUT: Final = Path(__file__).parents[1] / "build" / "bench" / "recycling.json"
TARGET: Final = 0.05
KEPT: Final = 64
MIXED: Final = ("aes-256-gcm", "hmac-sha256")
RECYCLE: Final = TokenCare().recycle_loads
SAMPLES: Final = 20
SETTLED_AT: Final = 2 * RECYCLE
"""Loads before the first measurement: caches, heap and token have taken what they take once."""


def resident(pid: int | str = "self") -> int:
    """Resident bytes of a process."""
    for line in Path(f"/proc/{pid}/status").read_text(encoding="ascii").splitlines():
        if line.startswith("VmRSS:"):
            return int(line.split()[1]) * 1024
    raise RuntimeError("no VmRSS")


def drive(folder: Path, loads: int, seconds: float, recycle: int) -> dict[str, Any]:
    """In this process: load, use and let go that many keys, or as many as fit into the time."""
    module = next(Path(path) for path in MODULE_PATHS if Path(path).is_file())
    config = TokenConfig(module, "bench", PinSource("file", str(folder / "pin")))
    initialize_token(config, folder / "data")
    token = Token(config, folder / "data", probe=False)
    lane = token.lane()
    cache: Cache[int, LoadedKey] = Cache(CacheLimits(300.0, KEPT), LoadedKey.destroy)
    care = TokenCare(recycle_loads=recycle, fresh_canary_every_s=86_400.0)
    keeper = Keeper(token, care, [sys.executable], renewed=lambda: None)
    keeper.start()
    begun = time.monotonic()
    base, done, interrupted = 0, 0, 0
    samples: list[int] = []
    every = max(1, (loads - SETTLED_AT) // SAMPLES)
    try:
        while done < loads and time.monotonic() - begun < seconds:
            algorithm = ALGORITHMS[MIXED[done % len(MIXED)]]
            try:
                with SecretBuffer.random(32) as secret:
                    key = lane.load(algorithm, secret)
                if done % len(MIXED):
                    lane.mac(key, b"x")
                else:
                    lane.encrypt(key, b"x", b"")
            except (NeedGrant, TokenError):  # a renewal came between
                interrupted += 1
                continue
            cache.put(done, key, time.monotonic())
            done += 1
            if done % RECYCLE == 0:
                cache.drop_values(lambda key: not key.lives, "flushed")
            if done == SETTLED_AT:
                gc.collect()
                base = resident()
            elif done > SETTLED_AT and (done - SETTLED_AT) % every == 0:
                samples.append(resident())
    finally:
        keeper.stop(10)
    gc.collect()
    return {
        "loads": done,
        "since_base": done - SETTLED_AT,
        "seconds": time.monotonic() - begun,
        "base": base,
        "end": max(resident(), *samples[-SAMPLES // 2 :], 0),
        "interrupted": interrupted,
        "renewals": keeper.told().renewals,
    }


def through_a_node(folder: Path, seconds: float, recycle: int) -> dict[str, Any]:
    """A supervised node process that serves each key once; every request is a cold load."""
    with LocalCluster(nodes=2, threshold=2, path=folder, domains=2) as cluster:
        cluster.stop()
        for node in cluster.nodes:
            path = folder / "nodes" / node / "node.toml"
            told = tomllib.loads(path.read_text(encoding="utf-8"))
            told["cache"] = {"max_uses": 1}
            told["token"] |= {"recycle_loads": recycle}
            told["limits"] = dict.fromkeys(("client_per_s", "combiner_per_s", "total_per_s"), 100_000.0)
            write_toml(path, told)
        cluster.start()
        with engine.connect(cluster.client_config) as kq:
            kq.create_key("k", "aes-256-gcm", threshold=2, shares=2)
            settled, pids = 1_000, cluster.serving()
            base: dict[str, int] = {}
            made: dict[str, int] = {}
            done, begun = 0, time.monotonic()
            while time.monotonic() - begun < seconds:
                _many(kq, 50)
                done += 50
                if done == settled:
                    base = {node: resident(pids[node] or 0) for node in cluster.nodes}
                    made = {name: health.made for name, health in _health(kq, cluster.nodes).items()}
            if not base:
                raise click.ClickException(f"only {done} loads in {seconds:g} s; give it more time")
            end = {node: resident(pids[node] or 0) for node in cluster.nodes}
            assert cluster.serving() == pids
            told = _health(kq, cluster.nodes)
    busiest = max(base, key=lambda node: told[node].made - made[node])
    health = told[busiest]
    return {
        "loads": health.made,
        "since_base": health.made - made[busiest],
        "seconds": seconds,
        "base": base[busiest],
        "end": end[busiest],
        "renewals": health.renewals,
    }


def _health(kq: engine.Engine, nodes: Sequence[str]) -> dict[str, TokenHealth]:
    for _ in range(10):  # a busy machine may be late with an answer
        told = {each.name: each.status.health for each in kq.status() if isinstance(each.status, NodeStatus)}
        if set(nodes) <= set(told):
            return told
    raise click.ClickException(f"only {', '.join(told) or 'nobody'} told its status")


def _many(kq: engine.Engine, count: int) -> list[bytes]:
    return [kq.encrypt("k", b"x", timeout=30) for _ in range(count)]


def _in_a_process(arguments: list[str]) -> dict[str, Any]:
    """Run this file again, with a node's allocator."""
    environment = overwriting_environment(os.environ) or dict(os.environ)
    command = [sys.executable, __file__, *arguments]
    ran = subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True, check=True)
    told: dict[str, Any] = json.loads(ran.stdout.splitlines()[-1])
    return told


def row(name: str, told: dict[str, Any], control: dict[str, Any], *, has_target: bool) -> dict[str, Any]:
    """One line of the report: the growth with renewal, and beside it that without, counted out to as many loads."""
    grown = (told["end"] - told["base"]) / told["base"]
    each = max(0.0, (control["end"] - control["base"]) / max(1, control["since_base"]))
    without = each * told["since_base"] / control["base"]
    return {
        "name": name,
        "value": round(100 * grown, 2),
        "unit": "% of the resident set",
        "peer": f"without renewal ({each:.0f} bytes a load)",
        "peer_value": round(100 * without, 2),
        "ratio": round(grown / without, 4) if without else None,
        "target": f"<= {100 * TARGET:g} %" if has_target else None,
        "met": grown <= TARGET if has_target else None,
    }


@click.command()
@click.option("--loads", default=1_000_000, show_default=True)
@click.option("--control-loads", default=100_000, show_default=True)
@click.option("--seconds", default=540.0, show_default=True, help="At most for the million.")
@click.option("--node-seconds", default=60.0, show_default=True, help="For each run through a node; 0: none.")
@click.option("--drive", "driven", type=int, hidden=True)
def main(loads: int, control_loads: int, seconds: float, node_seconds: float, driven: int | None) -> None:
    """Print the table and write build/bench/recycling.json."""
    if driven is not None:
        with tempfile.TemporaryDirectory(prefix="keyquorum-bench-") as folder:
            click.echo(json.dumps(drive(Path(folder), loads, seconds, driven)))
        return
    bounded = ["--seconds", str(seconds)]
    console = Console(width=150)
    control = _in_a_process(["--drive", "0", "--loads", str(control_loads), *bounded])
    told = _in_a_process(["--drive", str(RECYCLE), "--loads", str(loads), *bounded])
    rows = [row(f"growth over {told['loads']} cold loads", told, control, has_target=True)]
    details = [("without renewal", control), ("with renewal", told)]
    console.print_json(data=dict(details))
    if told["loads"] < loads:
        click.echo(f"only {told['loads']} of {loads} loads fitted into {seconds:g} s", err=True)
        rows[0]["met"] = False
    if node_seconds:
        for title, recycle in (("node without renewal", 0), ("node with renewal", 1_000)):
            with tempfile.TemporaryDirectory(prefix="keyquorum-bench-") as folder:
                details.append((title, through_a_node(Path(folder), node_seconds, recycle)))
        through, bare = details[3][1], details[2][1]
        rows.append(row(f"growth over {through['loads']} through a node", through, bare, has_target=False))
    table = Table("run", "loads", "renewals", "us a load", "MiB before", "MiB after", "growth")
    for title, each in details:
        grown = (each["end"] - each["base"]) / each["base"]
        table.add_row(
            title,
            str(each["loads"]),
            str(each["renewals"]),
            f"{each['seconds'] / each['loads'] * 1e6:.0f}",
            f"{each['base'] / 2**20:.1f}",
            f"{each['end'] / 2**20:.1f}",
            f"{100 * grown:+.2f} %",
        )
    console.print(table)
    for each in rows:
        told_of = f"{each['peer']}: {each['peer_value']} %"
        console.print(f"{each['name']}: {each['value']} % (target {each['target']}); {told_of}")
    OUTPUT.parent.mkdir(parents=True, exist_ok=True)
    OUTPUT.write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")
    sys.exit(0 if all(each["met"] is not False for each in rows) else 1)


if __name__ == "__main__":
    main()
