"""The policy that docs/deployment.md shows lets its clients do what the page then has them do."""

from __future__ import annotations

import re
import tomllib
from fnmatch import fnmatchcase
from pathlib import Path

from engine.attack.target import PREFIX

PAGE = (Path(__file__).parents[1] / "docs" / "deployment.md").read_text(encoding="utf-8")
NEEDS = {"status": "status", "key create": "generate", "encrypt": "encrypt", "decrypt": "decrypt"}


def test_the_policy_fits_the_commands() -> None:
    """Each command of step 5 is allowed to the client whose configuration is in force there."""
    (policy,) = re.findall(r"```(?:toml)?\n(# policy.toml\n.*?)```", PAGE, flags=re.DOTALL)
    rules = tomllib.loads(policy)["rule"]
    client, checked = "", 0
    for line in PAGE.partition("## 5. Use it")[2].partition("## Later")[0].splitlines():
        if found := re.match(r"export KEYQUORUM_CONFIG=\$PWD/([^/]+)/client.toml", line):
            client = found[1]
        if not (found := re.match(r"keyquorum (status|key create|encrypt|decrypt)(?: (\S+))?", line)):
            continue
        operation, key = NEEDS[found[1]], found[2] or "*"
        assert any(
            fnmatchcase(client, rule["identity"])
            and (key == "*" or fnmatchcase(key, rule["keys"]))
            and ("*" in rule["operations"] or operation in rule["operations"])
            for rule in rules
        ), f"{client!r} may not: {line}"
        assert f"init client {client} " in PAGE
        assert f"--card {client}.card" in PAGE
        checked += 1
    assert checked == 4


def test_the_attackers_policy_is_enough_and_no_more() -> None:
    """The rules of step 6 let the attacker do what a run needs, with the keys of a run alone."""
    page = PAGE.partition("## 6. Attack it")[2].partition("## Later")[0]
    (policy,) = re.findall(r"```toml\n(.*?)```", page, flags=re.DOTALL)
    rules = {rule["identity"]: rule for rule in tomllib.loads(policy)["rule"]}
    assert set(rules) == {"attacker", "neighbour"}
    assert all(rule["keys"] == PREFIX + "*" for rule in rules.values())
    assert rules["attacker"]["operations"] == ["*"]
    for name in rules:
        assert f"{name}/client.toml" in page
