"""The report of a run: Markdown for a person, JSON for a program, with one digest. It claims what was seen, no more."""

from __future__ import annotations

import hashlib
import json
import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from typing import Any, Final

from engine.attack.model import Options, Result, Verdict

__all__ = ["Report", "digest_of"]

FORMAT: Final = 1
_UNSAFE = re.compile(r"[\x00-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069]")
GROUPS: Final = {
    "transport": "Connections",
    "frames": "Frames and bodies",
    "rights": "Authorisation",
    "grants": "Grants",
    "orders": "Orders and downgrades",
    "shares": "A node that was taken over",
    "data": "Ciphertexts, signatures and MACs",
    "documents": "Manifests and routing tables",
    "members": "Membership while the cluster runs",
    "floods": "Availability",
}


def digest_of(told: Mapping[str, Any]) -> str:
    """SHA-256 in hex over the report's JSON without its digest: sorted keys, no spaces, UTF-8."""
    rest = {name: value for name, value in told.items() if name != "digest"}
    text = json.dumps(rest, sort_keys=True, separators=(",", ":"), ensure_ascii=False)
    return hashlib.sha256(text.encode("utf-8", "surrogateescape")).hexdigest()


@dataclass(frozen=True, slots=True)
class Report:
    """One run. ``started`` and ``ended`` are seconds since the Unix epoch."""

    cluster: str
    serial: int
    pin: str
    client: str
    second: str
    nodes: tuple[str, ...]
    user: str
    software: Mapping[str, str]
    started: float
    ended: float
    options: Options
    results: tuple[Result, ...]
    leftovers: tuple[str, ...] = ()
    earlier: tuple[str, ...] = ()

    def count(self, verdict: Verdict) -> int:
        """How many attacks ended so."""
        return sum(result.verdict is verdict for result in self.results)

    @property
    def summary(self) -> str:
        """One line."""
        held, failed = self.count(Verdict.HELD), self.count(Verdict.FAILED)
        undecided, not_run = self.count(Verdict.UNDECIDED), self.count(Verdict.NOT_RUN)
        tried = sum(result.trial.tried for result in self.results)
        return f"{held} held, {failed} FAILED, {undecided} undecided, {not_run} not run; {tried} cases"

    def to_json(self) -> dict[str, Any]:
        """Everything, with the digest."""
        told: dict[str, Any] = {
            "format": FORMAT,
            "cluster": self.cluster,
            "serial": self.serial,
            "pin": self.pin,
            "client": self.client,
            "second_client": self.second,
            "node_identities": list(self.nodes),
            "run_by": self.user,
            "software": dict(self.software),
            "started": _time(self.started),
            "ended": _time(self.ended),
            "options": {name: list(v) if isinstance(v, tuple) else v for name, v in asdict(self.options).items()},
            "summary": self.summary,
            "counts": {str(each): self.count(each) for each in Verdict},
            "leftover_keys": list(self.leftovers),
            "keys_of_other_runs": list(self.earlier),
            "attacks": [_result(result) for result in self.results],
        }
        told["digest"] = digest_of(told)
        return told

    def to_markdown(self) -> str:
        """The same for a person."""
        told = self.to_json()
        lines = [
            f"# Attack report of the cluster {_safe(self.cluster)}",
            "",
            f"**{self.summary}.**",
            "",
            "Each attack has a control: the same message in its honest form was accepted. After each attack that "
            "held, every server was still the same start, and every node did honest work with right results. *Held* "
            "says that what was tried here was refused or survived; it says nothing about what was not tried.",
            "",
            "| | |",
            "|---|---|",
            f"| cluster | {_safe(self.cluster)}, manifest serial {self.serial} |",
            f"| pin | `{self.pin}` |",
            f"| begun, ended | {told['started']}, {told['ended']} |",
            f"| run by | {_safe(self.user)}, as the client {_safe(self.client)} |",
            f"| second client | {_safe(self.second) or 'none'} |",
            f"| node identities | {_safe(', '.join(self.nodes)) or 'none'} |",
            f"| options | {_safe(_options(self.options))} |",
            f"| software | {_safe(_software(self.software))} |",
        ]
        if self.leftovers:
            lines.append(f"| keys that could not be destroyed | {_safe(', '.join(self.leftovers))} |")
        if self.earlier:
            lines.append(f"| keys of other runs, left alone | {_safe(', '.join(self.earlier))} |")
        lines += self._failures()
        for group, title in GROUPS.items():
            chosen = [result for result in self.results if result.attack.group == group]
            if chosen:
                lines += ["", f"## {title}", "", "| attack | verdict | cases | what was seen |", "|---|---|---|---|"]
                lines += [_row(result) for result in chosen]
        lines += self._details()
        lines += self._not_run()
        lines += [
            "",
            "---",
            "",
            f"Digest of the report (SHA-256 of its JSON without the digest): `{told['digest']}`",
            "",
        ]
        return "\n".join(lines)

    def _failures(self) -> list[str]:
        bad = [result for result in self.results if result.verdict in (Verdict.FAILED, Verdict.UNDECIDED)]
        if not bad:
            return []
        lines = ["", "## What did not hold, or could not be decided"]
        for result in bad:
            lines += ["", f"### {result.attack.id}: {result.verdict}", "", _safe(result.reason), ""]
            lines += [f"- {_safe(c.what)}, at {_safe(c.at)}: {_safe(c.seen)}" for c in result.trial.failures[:20]]
            if len(result.trial.failures) > 20:
                lines.append(f"- and {len(result.trial.failures) - 20} more; the JSON report has them")
        return lines

    def _details(self) -> list[str]:
        lines = ["", "## What each attack is, and its controls"]
        for result in self.results:
            if result.verdict is Verdict.NOT_RUN:
                continue
            attack, trial = result.attack, result.trial
            lines += [
                "",
                f"### {attack.id}: {attack.title}",
                "",
                f"- an attacker would want: {attack.wants}",
                f"- must be seen: {attack.must}",
                f"- seen: **{result.verdict}**, {_seen(result)}, in {result.seconds:.1f} s",
                f"- controls: {_safe(_controls(trial.controls)) or 'none'}",
            ]
            if trial.figures:
                told = "; ".join(f"{name} {value}" for name, value in trial.figures.items())
                lines.append(f"- figures: {_safe(told)}")
            lines += [f"- note: {_safe(each)}" for each in trial.notes]
            lines.append(f"- reference: {attack.reference}")
        return lines

    def _not_run(self) -> list[str]:
        left_out = [result for result in self.results if result.verdict is Verdict.NOT_RUN]
        lines = ["", "## What was not run", ""]
        lines += [f"- {each.attack.id} ({each.attack.title}): {_safe(each.reason)}" for each in left_out] or [
            "Nothing."
        ]
        return lines


def _time(seconds: float) -> str:
    return datetime.fromtimestamp(seconds, UTC).isoformat(timespec="seconds")


def _safe(text: str) -> str:
    """Text that another host may have filled, for one cell of a table."""
    return _UNSAFE.sub("?", text).replace("|", "\\|").replace("<", "&lt;")


def _options(options: Options) -> str:
    told = f"seed {options.seed}, rate {options.rate}/s, duration {options.duration_s:g} s, idle {options.idle}"
    told += ", quick" if options.quick else ""
    told += f", only {' '.join(options.only)}" if options.only else ""
    return told + (f", skip {' '.join(options.skip)}" if options.skip else "")


def _software(software: Mapping[str, str]) -> str:
    members = {name.removeprefix("member "): v for name, v in software.items() if name.startswith("member ")}
    versions = Counter(members.values())
    own = ", ".join(f"{name} {v}" for name, v in software.items() if not name.startswith("member "))
    told = ", ".join(f"{version} at {', '.join(n for n, v in members.items() if v == version)}" for version in versions)
    return f"{own}; members: {told}"


def _seen(result: Result) -> str:
    told = ", ".join(f"{word} x {count}" for word, count in result.trial.seen.most_common(8))
    return f"{result.trial.tried} cases ({_safe(told)})" if told else "nothing"


def _controls(controls: list[str]) -> str:
    counted = Counter(controls)
    return "; ".join(what if count == 1 else f"{what} (x {count})" for what, count in counted.items())


def _row(result: Result) -> str:
    seen = _safe(result.reason) if result.verdict is not Verdict.HELD else _seen(result)
    verdict = f"**{result.verdict}**" if result.verdict is Verdict.FAILED else str(result.verdict)
    return f"| {result.attack.id}: {result.attack.title} | {verdict} | {result.trial.tried} | {seen} |"


def _result(result: Result) -> dict[str, Any]:
    attack, trial = result.attack, result.trial
    return {
        "id": attack.id,
        "title": attack.title,
        "wants": attack.wants,
        "must": attack.must,
        "reference": attack.reference,
        "verdict": str(result.verdict),
        "reason": result.reason,
        "seconds": round(result.seconds, 2),
        "tried": trial.tried,
        "controls": list(trial.controls),
        "seen": dict(trial.seen),
        "failures": [asdict(each) for each in trial.failures],
        "cases": [asdict(each) for each in trial.cases],
        "figures": dict(trial.figures),
        "notes": list(trial.notes),
    }
