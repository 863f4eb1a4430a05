"""Finds every place in the code that parses bytes or text, and which of them no target covers.

A place is a function that calls one of ``PARSERS``. It is covered by a target that names it in ``covers``, or it is in
``ELSEWHERE`` with the reason why nothing untrusted is parsed there, or who covers it. Codecs and the kinds of signed
documents are found in the same way. What is new and not named makes tests/fuzz/test_fuzz.py fail.
"""

from __future__ import annotations

import ast
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Final

from targets import Target, codecs

ROOT: Final = Path(__file__).parents[2]
PACKAGES: Final = {"engine": ROOT / "src" / "engine", "nodes": ROOT / "nodes", "balancer": ROOT / "balancer"}
PARSERS: Final = frozenset(
    {
        "verify_envelope", "convert", "tomllib.load", "tomllib.loads", "b64decode", "fromhex", "from_bytes",
        "z85.decode", "json.loads", "json.load", "json.decode", "msgpack.decode", "unpack", "unpack_from", "unquote",
        "decode_dss_signature", "load_der_private_key", "load_pem_private_key", "load_der_public_key",
        "load_pem_public_key",
        "from_public_bytes", "from_private_bytes", "_decode_record", "unhexlify",
    }
)  # fmt: skip
"""Calls by their last names. Those of codecs are not among them: each codec has a target, whoever calls it."""

ELSEWHERE: Final[dict[str, str]] = {
    "engine.attack": "the attacker's side: it takes apart what it made itself; replies to it are decoded by the codecs",
    "engine.client.config.CurveIdentity.raw_public": "its own CURVE key, which load_identity has checked",
    "engine.client.membership.OwnCurve.secrets": "its own CURVE keys, which load_identity has checked",
    "engine.cli.doctor.look_at_folder": "the operator's own file; the program that it is for has its target",
    "engine.client.config.create_identity": "the name that an operator gives; the same rule as in an identity file",
    "engine.client.config.Identity.member": "its own CURVE key, which load_identity has checked",
    "balancer.mark.Mark.__init__": "its own file, beside its data",
    "nodes.command.drill": "what its parent, the command, writes to it",
    "nodes.forkserver._serve": "what its parent, the maker of a local cluster, writes to it",
    "engine.cli.backup._run_drill": "what its child writes to it",
    "nodes.command.check_token": "what its parent, the node, writes to it",
    "nodes.supervisor._Parent._hear": "what its child, the node, writes to it; whole frames of a fixed size alone",
    "nodes.server.Server.__init__": "its own CURVE key, which load_identity has checked",
    "engine.client.connections.Connections._read": "what libzmq tells of its own sockets",
    "engine.client.connections._traffic": "what the kernel tells of a socket",
    "engine.client.web._Guard.lets": "a token in base64, compared and thrown away; tests/engine/test_web.py",
    "engine.sharing.placement.placement_group": "the number of a hash",
    "nodes.token.Lane.sign": "the token's answer; tests/nodes/test_token.py",
    "engine.protocol.ciphertext.version_in": "a number that chooses the key; the token holds it against the ciphertext",
    "engine.client._histogram": "durations",
    "engine.protocol._fastlines": "writes alone",
    "engine.protocol._nodestate": "numbers that the router took from what it had read",
    "nodes._usebuffer": "what a node of before left in its own folder; tests/nodes/test_audit.py",
    "nodes._fastpath": "reads by fastwire.h, which has a target, what a router took; tests/nodes/test_fastpath.py",
}
"""Functions and whole packages that parse and have no target: why. One that parses no more may stay or go."""


def _name(call: ast.Call) -> str:
    parts: list[str] = []
    node: ast.expr = call.func
    while isinstance(node, ast.Attribute):
        parts.insert(0, node.attr)
        node = node.value
    if isinstance(node, ast.Name):
        parts.insert(0, node.id)
    elif isinstance(node, ast.Subscript) and isinstance(node.value, ast.Name):
        parts.insert(0, node.value.id + "[]")
    else:
        parts.insert(0, "?")
    return ".".join(parts)


def _is_parser(call: ast.Call) -> bool:
    name = _name(call)
    if call.args and all(isinstance(each, ast.Constant) for each in call.args):
        return False  # a constant of the code
    return name.rpartition(".")[2] in PARSERS or ".".join(name.split(".")[-2:]) in PARSERS


def _functions(tree: ast.AST, prefix: str) -> Iterator[tuple[str, ast.AST]]:
    """(qualified name, node) of each function, and of the module's own statements; nested ones belong to theirs."""
    for child in ast.iter_child_nodes(tree):
        if isinstance(child, ast.ClassDef):
            yield from _functions(child, f"{prefix}.{child.name}")
        elif isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef):
            yield f"{prefix}.{child.name}", child
        else:
            yield prefix, child


def sources(packages: dict[str, Path]) -> dict[str, ast.AST]:
    """Module name -> its tree."""
    found = {}
    for package, folder in packages.items():
        for path in sorted(folder.rglob("*.py")):
            parts = path.relative_to(folder).with_suffix("").parts
            found[".".join((package, *parts)).removesuffix(".__init__")] = ast.parse(path.read_text(encoding="utf-8"))
    return found


def parsing_places(trees: dict[str, ast.AST]) -> dict[str, list[str]]:
    """Function -> the parsers that it calls."""
    found: dict[str, list[str]] = {}
    for module, tree in trees.items():
        for name, node in _functions(tree, module):
            used = sorted({_name(each) for each in ast.walk(node) if isinstance(each, ast.Call) and _is_parser(each)})
            if used:
                found.setdefault(name, []).extend(used)
    return found


def signed_kinds(trees: dict[str, ast.AST]) -> set[str]:
    """The kinds of documents that are signed or verified anywhere, written there or in a constant."""
    found = set()
    for tree in trees.values():
        constants = {
            target.id: node.value.value
            for node in ast.walk(tree)
            if isinstance(node, ast.Assign)
            and isinstance(node.value, ast.Constant)
            and isinstance(node.value.value, str)
            for target in node.targets
            if isinstance(target, ast.Name)
        }
        for node in ast.walk(tree):
            if not isinstance(node, ast.Call) or _name(node).rpartition(".")[2] not in (
                "verify_envelope",
                "sign_envelope",
            ):
                continue
            place = 1 if _name(node).endswith("verify_envelope") else 0
            given = node.args[place] if len(node.args) > place else None
            if isinstance(given, ast.Constant) and isinstance(given.value, str):
                found.add(given.value)
            elif isinstance(given, ast.Name) and given.id in constants:
                found.add(constants[given.id])
            else:
                found.add(f"? in {ast.unparse(node)[:80]}")
    return found


def natives(packages: dict[str, Path]) -> list[str]:
    """The native modules of the packages."""
    found = []
    for package, folder in packages.items():
        for path in sorted(folder.rglob("*.pyx")):
            found.append(".".join((package, *path.relative_to(folder).with_suffix("").parts)))
    return found


def uncovered_natives(targets: Iterable[Target], names: Iterable[str]) -> list[str]:
    """Native modules of which no target covers anything, and that are not accounted for."""
    told = {each.rpartition(".")[0] for target in targets for each in target.covers}
    told |= {each.rpartition(".")[0] for each in told}  # a method's module
    return [f"the native module {name!r} has no target" for name in names if name not in told | ELSEWHERE.keys()]


def uncovered(targets: Iterable[Target], trees: dict[str, ast.AST]) -> list[str]:
    """What parses, and is neither a target's nor accounted for; each told in a sentence."""
    told = [each for target in targets for each in target.covers]
    trees = {
        name: tree for name, tree in trees.items() if not any(f"{name}.".startswith(f"{each}.") for each in ELSEWHERE)
    }
    places = parsing_places(trees)
    missing = [
        f"{name} parses ({', '.join(calls)}) and no target covers it"
        for name, calls in sorted(places.items())
        if name not in told and name not in ELSEWHERE
    ]
    names = {each.name for each in targets}
    missing += [f"the codec {name!r} has no target" for name in codecs() if f"codec/{name}" not in names]
    kinds = signed_kinds(trees)
    documents = {name.removeprefix("document/") for name in names if name.startswith("document/")}
    missing += [f"the signed kind {kind!r} has no target" for kind in sorted(kinds) if kind not in documents]
    return missing
