"""Runs targets: one input, a block of inputs, many blocks; makes a failing input small; says which lines were reached.

A block is ``BLOCK`` inputs of one target that follow from (seed, target, block) alone: it begins with the samples and
the corpus, and an input with a new outcome is changed further within it. So a failure is found again by its target,
seed and iteration, without the millions before it.
"""

from __future__ import annotations

import gc
import hashlib
import re
import resource
import signal
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from random import Random
from typing import Any, Final

from backups import backup_targets
from documents import document_targets
from formats import format_targets
from targets import Finding, Target, by_name, codec_targets, frame_targets, modules
from zmtp import zmtp_targets

BLOCK: Final = 8_192
HANG_S: Final = 4
"""Seconds of CPU after which an execution is ended; each target has a far smaller bound that it is judged by."""
POOL_MAX: Final = 64
"""Inputs with a new outcome that a block changes further."""
REASONS_MAX: Final = 400
CORPUS: Final = Path(__file__).parent / "corpus"
CORPUS_INPUT_MAX: Final = 4_096
MEMORY_MAX: Final = 512 * 1024 * 1024
"""What a process may take more than at its start: an input that claims gigabytes fails in this."""


def all_targets() -> dict[str, Target]:
    """Every target by its name."""
    return by_name(
        [*codec_targets(), *frame_targets(), *document_targets(), *format_targets(), *zmtp_targets(), *backup_targets()]
    )


@dataclass
class Outcome:
    """What became of one input."""

    accepted: bool
    reason: str


@dataclass
class Failure:
    """A finding, with what finds it again."""

    target: str
    seed: int
    iteration: int
    problem: str
    data: str


@dataclass
class Tally:
    """What a number of executions came to."""

    executions: int = 0
    cpu_s: float = 0.0
    accepted: int = 0
    reasons: Counter[str] = field(default_factory=Counter)
    slowest_s: float = 0.0
    failures: list[Failure] = field(default_factory=list)
    grown_kib: int = 0

    def add(self, other: Tally) -> None:
        """Take in another."""
        self.executions += other.executions
        self.cpu_s += other.cpu_s
        self.accepted += other.accepted
        self.reasons.update(other.reasons)
        self.slowest_s = max(self.slowest_s, other.slowest_s)
        self.failures += other.failures
        self.grown_kib += other.grown_kib


_NUMBER = re.compile(r"0x[0-9a-f]+|\d+")
_QUOTED = re.compile(r"'(?:[^'\\]|\\.)*(?:'|\Z)|\"(?:[^\"\\]|\\.)*(?:\"|\Z)|`\$[^`]*`|[0-9a-f]{16,}")
_short: dict[str, str] = {}


def short(text: str) -> str:
    """An error's text without what differs from input to input."""
    found = _short.get(text)
    if found is None:
        found = _NUMBER.sub("#", _QUOTED.sub("'", text[:300]))[:120]
        if len(_short) < 50_000:
            _short[text] = found
    return found


def execute(target: Target, data: bytes) -> Outcome:
    """Decode one input; ``Finding`` for anything that must not be."""
    try:
        return Outcome(True, target.decode(data))
    except Finding:
        raise
    except target.errors as error:
        text = str(error)
        if len(text) > target.text_max:
            raise Finding(
                f"the error's text has {len(text)} characters, at most {target.text_max} are allowed"
            ) from None
        for secret in target.secrets:
            if secret.decode() in text or secret.hex() in text:
                raise Finding(f"the error's text shows a secret: {type(error).__name__}") from None
        return Outcome(False, f"{type(error).__name__}: {short(text)}")
    except MemoryError:
        raise Finding("MemoryError: more memory than an input may take") from None
    except Exception as error:  # whatever is not declared is what is looked for
        raise Finding(f"{type(error).__name__}, which is not declared: {str(error)[:200]}") from error
    except BaseException as error:
        if type(error).__name__ != "PanicException":  # of a library in Rust
            raise
        raise Finding(f"a panic: {str(error)[:200]}") from error


class Hang(BaseException):
    """An execution took too long; no handler of the code may catch it."""


@contextmanager
def bounded() -> Iterator[Callable[[], None]]:
    """End what takes more than ``HANG_S`` seconds of CPU; call what is yielded from time to time."""

    def ended(_: int, __: Any) -> None:
        raise Hang(f"more than {HANG_S} s of CPU")

    before = signal.signal(signal.SIGVTALRM, ended)
    try:
        yield lambda: signal.setitimer(signal.ITIMER_VIRTUAL, HANG_S)  # type: ignore[func-returns-value]
    finally:
        signal.setitimer(signal.ITIMER_VIRTUAL, 0)
        signal.signal(signal.SIGVTALRM, before)


def corpus_of(name: str) -> list[bytes]:
    """The checked-in inputs of a target, in the order of their names."""
    folder = CORPUS / folder_name(name)
    return [path.read_bytes() for path in sorted(folder.glob("*.bin"))] if folder.is_dir() else []


def folder_name(target: str) -> str:
    """The corpus folder of a target."""
    return re.sub(r"[^A-Za-z0-9.-]+", "-", target)


def _problem(target: Target, data: bytes) -> str:
    """What is wrong with an input, or nothing."""
    with bounded() as again:
        again()
        try:
            execute(target, data)
        except (Finding, Hang) as problem:
            return str(problem)
    return ""


def cpu_of(target: Target, data: bytes) -> float:
    """The least CPU time of three executions, in seconds."""
    times = []
    for _ in range(3):
        begun = time.process_time()
        with suppress(Finding, Hang):
            execute(target, data)
        times.append(time.process_time() - begun)
    return min(times)


def inputs(target: Target, seed: int, block: int, outcome: list[str | None]) -> Iterator[bytes]:
    """The inputs of a block; the caller puts the reason of each into ``outcome`` when it is a new one, else None."""
    pool = [*target.seeds(), *_corpus(target)]
    r = Random(f"{seed}/{target.name}/{block}")
    if block == 0:
        for data in list(pool):
            yield data
    base = len(pool)
    rnd = r.random
    while True:
        # The samples are taken as often as all that was found since.
        place = int(rnd() * base) if rnd() < 0.5 else int(rnd() * len(pool))
        data = target.change(r, pool[place], pool[int(rnd() * len(pool))])
        outcome[0] = None
        yield data
        if outcome[0] is not None and len(pool) < base + POOL_MAX and len(data) <= 16_384:
            pool.append(data)


_corpora: dict[str, list[bytes]] = {}


def _corpus(target: Target) -> list[bytes]:
    if target.name not in _corpora:
        _corpora[target.name] = corpus_of(target.name)
    return _corpora[target.name]


def run_block(target: Target, seed: int, block: int, count: int = BLOCK, *, stop_at: int | None = None) -> Tally:
    """Execute ``count`` inputs of a block, up to the first failure; ``stop_at`` is the last iteration to run."""
    tally, seen = Tally(), set()
    outcome: list[str | None] = [None]
    resident = _resident_kib()
    begun = time.process_time()
    with bounded() as again:
        given = inputs(target, seed, block, outcome)
        for number in range(count):
            data = next(given)
            if number % 64 == 0 or target.cpu_s > 0.5:
                again()
            before = time.perf_counter()
            problem = ""
            try:
                found = execute(target, data)
            except Finding as finding:
                problem = str(finding)
            except Hang as hang:
                problem = str(hang)
                again()
            took = time.perf_counter() - before
            tally.executions += 1
            if took > target.cpu_s and not problem and (cpu := cpu_of(target, data)) > target.cpu_s:
                problem = f"{cpu:.2f} s of CPU, at most {target.cpu_s} s are allowed"
            if problem:
                iteration = block * BLOCK + number
                tally.failures.append(Failure(target.name, seed, iteration, problem, data.hex()))
                break
            tally.slowest_s = max(tally.slowest_s, took)
            tally.accepted += found.accepted
            reason = f"+ {found.reason}" if found.accepted else found.reason
            if reason not in seen:
                if len(seen) < REASONS_MAX:
                    seen.add(reason)
                outcome[0] = reason
            if reason in tally.reasons or len(tally.reasons) < REASONS_MAX:
                tally.reasons[reason] += 1
            if stop_at is not None and block * BLOCK + number >= stop_at:
                break
    tally.cpu_s = time.process_time() - begun
    tally.grown_kib = _resident_kib() - resident
    return tally


def nth_input(target: Target, seed: int, iteration: int) -> bytes:
    """The input of an iteration: its block is run up to it."""
    outcome: list[str | None] = [None]
    seen: set[str] = set()
    block, number = divmod(iteration, BLOCK)
    for place, data in enumerate(inputs(target, seed, block, outcome)):
        if place == number:
            return data
        try:
            found = execute(target, data)
        except (Finding, Hang):
            continue
        reason = f"+ {found.reason}" if found.accepted else found.reason
        if reason not in seen:
            if len(seen) < REASONS_MAX:
                seen.add(reason)
            outcome[0] = reason
    raise AssertionError("inputs do not end")


def _resident_kib() -> int:
    return int(Path("/proc/self/statm").read_text(encoding="ascii").split()[1]) * resource.getpagesize() // 1024


def limit_memory() -> None:
    """An input that makes this process take much more memory than it has now fails with MemoryError."""
    pages = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[0])
    limit = pages * resource.getpagesize() + MEMORY_MAX
    resource.setrlimit(resource.RLIMIT_AS, (limit, resource.getrlimit(resource.RLIMIT_AS)[1]))


# --- making an input small ---


def minimised(data: bytes, keeps: Callable[[bytes], bool], attempts: int = 2_000) -> bytes:
    """A shorter input that still has the property: pieces are cut out, then bytes made zero, as long as it keeps."""
    left = attempts
    size = max(1, len(data) // 2)
    while size and left > 0:
        at = 0
        while at < len(data) and left > 0:
            shorter = data[:at] + data[at + size :]
            left -= 1
            if keeps(shorter):
                data = shorter
            else:
                at += size
        size //= 2
    for at in range(len(data)):
        if left <= 0:
            break
        if data[at]:
            plain = data[:at] + b"\0" + data[at + 1 :]
            left -= 1
            if keeps(plain):
                data = plain
    return data


def minimise_failure(target: Target, data: bytes) -> bytes:
    """A small input with the same problem, as far as its numbers go."""
    wanted = short(_problem(target, data))
    if not wanted or " of CPU" in wanted:
        return data  # each attempt at a slow one would take as long
    return minimised(data, lambda each: short(_problem(target, each)) == wanted)


# --- the corpus ---


def collect(target: Target, seed: int, blocks: int, most: int) -> dict[str, bytes]:
    """The shortest input seen for each reason that is not among the samples' own, as many as ``most``."""
    found: dict[str, bytes] = {}
    for data in [*target.seeds(), *corpus_of(target.name)]:
        _keep(found, target, data)
    plain = set(found)
    for block in range(blocks):
        outcome: list[str | None] = [None]
        given, seen = inputs(target, seed, block, outcome), set()
        for _ in range(BLOCK if target.weight >= 0.05 else 300):
            data = next(given)
            reason = _keep(found, target, data)
            if reason and reason not in seen:
                seen.add(reason)
                outcome[0] = reason
    new = sorted(
        (reason for reason in found if reason not in plain),
        key=lambda each: (_SHALLOW.search(each) is not None, len(found[each]), each),
    )
    return {reason: found[reason] for reason in new[:most]}


_SHALLOW = re.compile("Expected `|canonical|truncated|malformed|UTF-|enum value|the limit is|harness")
"""Refusals of the codecs, which each target has: those behind them come first."""


def _keep(found: dict[str, bytes], target: Target, data: bytes) -> str:
    try:
        outcome = execute(target, data)
    except (Finding, Hang):
        return ""
    reason = f"+ {outcome.reason}" if outcome.accepted else outcome.reason
    if len(data) <= CORPUS_INPUT_MAX and (reason not in found or len(data) < len(found[reason])):
        found[reason] = data
    return reason


def write_corpus(name: str, found: Iterable[bytes]) -> int:
    """Write inputs into a target's folder, each under its hash; the bytes written."""
    folder = CORPUS / folder_name(name)
    total = 0
    for data in found:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / f"{hashlib.sha256(data).hexdigest()[:12]}.bin").write_bytes(data)
        total += len(data)
    return total


# --- which lines were reached ---


def traced(targets: Iterable[Target], seed: int, count: int) -> dict[str, set[int]]:
    """File -> the lines of the three packages that ``count`` inputs of each target reach."""
    files = {str(module.__file__): set() for module in modules() if module.__file__.endswith(".py")}  # type: ignore[var-annotated]

    def line(frame: Any, event: str, _: Any) -> Any:
        if event == "line":
            files[frame.f_code.co_filename].add(frame.f_lineno)
        return line

    def call(frame: Any, _: str, __: Any) -> Any:
        return line if frame.f_code.co_filename in files else None

    for target in targets:
        outcome: list[str | None] = [None]
        given, seen = inputs(target, seed, 0, outcome), set()
        extra = [*target.seeds(), *corpus_of(target.name)]
        sys.settrace(call)
        try:
            for number in range(len(extra) + max(20, int(count * min(1.0, target.weight)))):
                data = next(given)
                found = execute(target, data)
                reason = f"+ {found.reason}" if found.accepted else found.reason
                if reason not in seen:
                    seen.add(reason)
                    outcome[0] = reason
                del number
        finally:
            sys.settrace(None)
    return files


def quiet_process() -> None:
    """Fewer collections of cycles; a bounded address space."""
    gc.set_threshold(100_000)
    gc.freeze()
    limit_memory()


def failure_fields(failure: Failure) -> dict[str, Any]:
    """As the report has it."""
    return asdict(failure)
