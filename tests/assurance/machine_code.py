"""Owns the analysis of machine code: where secrets flow in what the compiler made of a C source (x86-64, System V ABI).

It is an abstract interpretation of `objdump -d -r` over all paths. Each register, each mask, the flags and each byte of
the stack has a *kind*, which says what the value is or points to; where two paths with different kinds meet, it becomes
one that is treated with the suspicion of both:

- PUBLIC: a number, or a pointer to public memory
- STREAM: a pointer to a gf256_stream, secret but for its block number
- TABLE: a pointer to an array of pointers to rows
- ROW: a pointer to secret bytes
- EITHER: a pointer to secret or to public memory: what is read there is secret, and no secret may be written
- SECRET: secret bytes themselves; VECTOR: those that were in a vector register

A *decision* is a secret in an address, a branch, a mask of a load or store, a size, or in public memory. A *leaving* is
a value of a vector register that reaches a general or mask register or the flags, straight or by a spill to the stack.
What the analysis does not know is an error, never ignored. It assumes that pointers stay in their arrays (ASan's part),
that memcpy and memset take a time that depends on the size alone, and that the exported functions get what SIGNATURES
says.
"""

from __future__ import annotations

import re
import subprocess
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

__all__ = ["SIGNATURES", "Findings", "Unknown", "analyse"]

STACK, PUBLIC, STREAM, TABLE, ROW, EITHER, SECRET, VECTOR = -1, 0, 1, 2, 3, 4, 5, 6
BLOCK_OFFSET, BLOCK_BYTES = 240, 8  # of gf256_stream.block, behind 15 round keys
ANYWHERE, FRAME_MAX = -(1 << 40), 1 << 13

Place = tuple[str, int, bool] | int | None
Value = tuple[int, Place]
"""Kind, and of a stack pointer (frame, offset, exactly?), of a stream pointer its offset or None."""

NOTHING: Value = (PUBLIC, None)
HIDDEN: Value = (SECRET, None)

SIGNATURES: Mapping[str, list[int]] = {
    r"gf256_list_\w+": [PUBLIC] * 5,
    r"gf256_run_\w+": [PUBLIC, PUBLIC, PUBLIC, TABLE, TABLE, PUBLIC, PUBLIC, PUBLIC],
    r"gf256_add_\w+": [PUBLIC, TABLE, ROW, PUBLIC, PUBLIC],
    r"gf256_draw_\w+": [PUBLIC, PUBLIC, PUBLIC, ROW, TABLE, TABLE, STREAM, PUBLIC],
    r"gf256_aes_start\w*": [STREAM, ROW],
    r"gf256_aes_fill_\w+": [STREAM, ROW, PUBLIC],
    r"gf256_are_sums": [PUBLIC, PUBLIC],
}
"""What the exported functions of gf256.h are given."""

ARGUMENTS = ("rdi", "rsi", "rdx", "rcx", "r8", "r9")
KEPT = ("rbx", "rbp", "r12", "r13", "r14", "r15", "rsp")
NUMBERED = {"ax": "rax", "bx": "rbx", "cx": "rcx", "dx": "rdx", "si": "rsi", "di": "rdi", "bp": "rbp", "sp": "rsp"}
REGISTERS: dict[str, tuple[str, int]] = {}
for _short, _full in NUMBERED.items():
    REGISTERS |= {f"r{_short}": (_full, 8), f"e{_short}": (_full, 4), _short: (_full, 2)}
    REGISTERS[f"{_short[0]}l" if _short[1] == "x" else f"{_short}l"] = (_full, 1)
    if _short[1] == "x":
        REGISTERS[f"{_short[0]}h"] = (_full, 1)
for _number in range(8, 16):
    REGISTERS |= {
        f"r{_number}{_end}": (f"r{_number}", _size)
        for _end, _size in zip(("", "d", "w", "b"), (8, 4, 2, 1), strict=True)
    }
for _number in range(32):
    REGISTERS |= {
        f"{_width}mm{_number}": (f"v{_number}", _size) for _width, _size in zip("xyz", (16, 32, 64), strict=True)
    }
for _number in range(8):
    REGISTERS[f"k{_number}"] = (f"k{_number}", 8)
del _short, _full, _number

SUFFIXES = {"b": 1, "w": 2, "l": 4, "q": 8}
ALU = {"add", "sub", "xor", "and", "or", "adc", "sbb", "imul", "shl", "shr", "sar", "rol", "ror", "neg", "not"}
ALU |= {"inc", "dec", "bswap"}
GENERAL = ALU | {"mov", "movabs", "lea", "cmp", "test", "push", "pop", "xchg"}
CONDITION = r"(?:n?[abcglopsz]e?|n?[abgl]e|p[eo]|ne|e)"
FREE = {"nop", "nopw", "nopl", "vzeroupper", "endbr64", "sfence", "ud2", "xchg"}
FILLING = re.compile(r"nop[wl]?|xchg|data16|cs")
MOVES = re.compile(
    r"v?mov(dq[au]\w*|[au]p[sd]|nt\w+|q|d|hps|lps|hpd|lpd|ss|sd)$|v?lddqu$|vbroadcast|vpbroadcast|kmov[bwdq]$"
)
SMALL_STORES = {"movq": 8, "vmovq": 8, "movhps": 8, "movlps": 8, "vmovhps": 8, "vmovlps": 8, "movhpd": 8}
SMALL_STORES |= {"vmovhpd": 8, "movd": 4, "vmovd": 4, "vextracti128": 16, "vextracti32x4": 16, "vextracti64x4": 32}
SMALL_LOADS = {**SMALL_STORES, "vpbroadcastq": 8, "vpbroadcastd": 4, "vpinsrq": 8, "pinsrq": 8, "vbroadcasti128": 16}
SMALL_LOADS |= {"vbroadcasti32x4": 16, "vbroadcasti64x2": 16, "vpinsrd": 4, "vinserti128": 16, "vpbroadcastb": 1}
TO_FLAGS = re.compile(r"v?ptest|v?u?comis[sd]|kortest[bwdq]|ktest[bwdq]|vtestp[sd]")
LIBRARY = {"memcpy", "memmove", "memset", "explicit_bzero"}


class Unknown(Exception):
    """An instruction or a use of memory that the analysis does not cover."""


@dataclass(frozen=True)
class Instruction:
    """One of them, with the symbol that the linker will put into it."""

    at: int
    text: str
    name: str
    operands: tuple[str, ...]
    symbol: str


@dataclass
class Findings:
    """What is against the claim, and how much code was looked at."""

    decisions: set[str] = field(default_factory=set)
    leavings: set[str] = field(default_factory=set)
    spills: set[str] = field(default_factory=set)
    mnemonics: Counter[str] = field(default_factory=Counter)


@dataclass
class State:
    """All kinds before one instruction. A byte of the stack that was not written is secret: nobody knows what it is."""

    registers: dict[str, Value]
    flags: int
    stack: dict[tuple[str, int], Value]

    def copy(self) -> State:
        return State(dict(self.registers), self.flags, dict(self.stack))

    def merge(self, other: State) -> bool:
        """Take the larger kind of each; whether anything became larger."""
        changed = False
        for name in self.registers:
            value = joined(self.registers[name], other.registers[name])
            changed |= value != self.registers[name]
            self.registers[name] = value
        flags = max(self.flags, other.flags)
        changed |= flags != self.flags
        self.flags = flags
        for place in list(self.stack):
            if place not in other.stack:
                del self.stack[place]
                changed = True
                continue
            value = joined(self.stack[place], other.stack[place])
            changed |= value != self.stack[place]
            self.stack[place] = value
        return changed


def joined(a: Value, b: Value) -> Value:
    """What a value is that may be either."""
    if a == b:
        return a
    if a[0] == STACK and b[0] == STACK:
        (one, low, _), (other, lower, _) = a[1], b[1]  # type: ignore[misc]
        return (STACK, (one, min(low, lower), False)) if one == other else HIDDEN
    if STACK in (a[0], b[0]):
        return HIDDEN
    if a[0] == b[0]:
        return (a[0], None)
    return (max(a[0], b[0], EITHER), None)


def computed(values: Iterable[Value]) -> Value:
    """What comes out of a calculation with several values."""
    result = NOTHING
    for value in values:
        stacks = [each for each in (result, value) if each[0] == STACK]
        other = value if stacks[:1] == [result] else result
        if len(stacks) == 1 and other[0] in (PUBLIC, ROW):  # the distance of two rows is a ROW, too
            result = (STACK, (stacks[0][1][0], ANYWHERE, False))  # type: ignore[index]
        elif stacks:
            result = HIDDEN
        elif PUBLIC in (result[0], value[0]):
            result = (max(result[0], value[0]), None)
        else:
            result = joined((result[0], None), (value[0], None))
    return result


def moved(value: Value, by: int) -> Value:
    """A pointer plus a constant."""
    if value[0] == STREAM and isinstance(value[1], int):
        return (STREAM, value[1] + by)
    if value[0] == STACK and isinstance(value[1], tuple):
        frame, offset, exact = value[1]
        if not exact and offset + by < -FRAME_MAX:  # a loop that counts down
            return (STACK, (frame, ANYWHERE, False))
        return (STACK, (frame, offset + by, exact))
    return value


def disassembled(target: Path) -> dict[str, list[Instruction]]:
    """The functions of an object file."""
    command = ["objdump", "-d", "-r", "--no-show-raw-insn", str(target)]
    text = subprocess.run(command, capture_output=True, text=True, check=True, timeout=120).stdout
    found: dict[str, list[Instruction]] = {}
    into: list[Instruction] = []
    for line in text.splitlines():
        start = re.match(r"[0-9a-f]+ <(.+)>:", line)
        if start is not None:
            into = found.setdefault(start[1], [])
            continue
        symbol = re.match(r"\s+[0-9a-f]+: R_X86_64_\w+\s+(\S+)", line)
        if symbol is not None:
            into[-1] = replace(into[-1], symbol=symbol[1])
            continue
        each = re.match(r"\s+([0-9a-f]+):\t(.*)", line)
        if each is None:
            continue
        code = re.sub(r"\s+[#<].*", "", each[2]).strip()
        code = re.sub(r"^((data16|cs|bnd|notrack|repz)\s+)+", "", code)
        name, _, operands = code.partition(" ")
        into.append(Instruction(int(each[1], 16), code, name, tuple(split(operands)), ""))
    return {name: code for name, code in found.items() if code}


def split(operands: str) -> Iterator[str]:
    """At the commas outside parentheses."""
    depth, word = 0, ""
    for letter in operands.strip():
        depth += {"(": 1, ")": -1}.get(letter, 0)
        if letter == "," and depth == 0:
            yield word
            word = ""
        else:
            word += letter
    if word:
        yield word


def pointed_at(target: Path, section: str) -> list[tuple[int, int]]:
    """(place, .text offset) of the relocations of a section that point to code."""
    text = subprocess.run(["objdump", "-r", "-j", section, str(target)], capture_output=True, text=True, check=False)
    found = re.findall(r"^([0-9a-f]+) R_X86_64_\w+\s+\.text(?:\+0x([0-9a-f]+))?$", text.stdout, re.MULTILINE)
    return [(int(place, 16), int(offset or "0", 16)) for place, offset in found]


class Analysis:
    """One object file; `run` goes on until no kind becomes larger."""

    def __init__(self, target: Path, signatures: Mapping[str, list[int]]) -> None:
        self.code = disassembled(target)
        self.findings = Findings()
        self.signatures = signatures
        self.where = {each.at: (name, i) for name, code in self.code.items() for i, each in enumerate(code)}
        cases = pointed_at(target, ".rodata")
        # gcc's tables of a switch hold distances from their own start.
        self.cases = [offset - (place - cases[0][0]) for place, offset in cases]
        self.taken = {offset for _, offset in pointed_at(target, ".data.rel.ro.local")}
        self.states: dict[int, State] = {}
        self.work: list[int] = []
        self.seen: set[int] = set()
        for name, code in self.code.items():
            for pattern, kinds in signatures.items():
                if re.fullmatch(pattern, name):
                    self.enter(code[0].at, self.entry(kinds))

    def entry(self, kinds: list[int]) -> State:
        """The state at the start of an exported function."""
        registers = dict.fromkeys({name for name, _ in REGISTERS.values()}, NOTHING)
        stack: dict[tuple[str, int], Value] = {("entry", i): NOTHING for i in range(8)}  # where it returns to
        for i, kind in enumerate(kinds):
            value: Value = (kind, 0 if kind == STREAM else None)
            if i < len(ARGUMENTS):
                registers[ARGUMENTS[i]] = value
            else:
                stack |= {("entry", 8 + 8 * (i - len(ARGUMENTS)) + byte): value for byte in range(8)}
        registers["rsp"] = (STACK, ("entry", 0, True))
        return State(registers, PUBLIC, stack)

    def enter(self, at: int, state: State) -> None:
        if at not in self.where:
            raise Unknown(f"a jump to {at:#x}, which is no instruction")
        if at not in self.states:
            self.states[at] = state.copy()
        elif not self.states[at].merge(state):
            return
        self.work.append(at)

    def run(self) -> Findings:
        while self.work:
            at = self.work.pop()
            name, i = self.where[at]
            code = self.code[name]
            state = self.states[at].copy()
            # Straight on, as far as nothing else comes in.
            while True:
                self.seen.add(code[i].at)
                step = Step(self, name, code[i], state)
                goes_on = step.take()
                for jump in step.jumps:
                    self.enter(jump, state)
                if not goes_on:
                    break
                i += 1
                if i == len(code):
                    raise Unknown(f"{name} runs over its end")
                if step.jumps or code[i].at in self.states or code[i].at in self.leaders:
                    self.enter(code[i].at, state)
                    break
        # Nothing may be left out: neither a function nor code that is reached some unknown way.
        missed = [
            f"{name}+{each.at:#x}: {each.text}"
            for name, code in self.code.items()
            for each in code
            if each.at not in self.seen and not FILLING.fullmatch(each.name)
        ]
        if missed:
            raise Unknown(f"it is not known how this is reached: {missed[0]} (and {len(missed) - 1} more)")
        self.findings.mnemonics = Counter(each.name for code in self.code.values() for each in code)
        return self.findings

    @property
    def leaders(self) -> set[int]:
        if not hasattr(self, "_leaders"):
            jumps = (re.match(r"j\w+ +([0-9a-f]+) ", each.text + " ") for code in self.code.values() for each in code)
            self._leaders = {int(jump[1], 16) for jump in jumps if jump is not None} | set(self.cases)
        return self._leaders


class Step:
    """One instruction on one state, which it changes."""

    def __init__(self, analysis: Analysis, function: str, each: Instruction, state: State) -> None:
        self.analysis, self.function, self.each, self.state = analysis, function, each, state
        self.jumps: list[int] = []

    # Findings.

    def decision(self, what: str) -> None:
        self.analysis.findings.decisions.add(f"{self.function}+{self.each.at:#x}: {what}: {self.each.text}")

    def leaving(self) -> None:
        self.analysis.findings.leavings.add(f"{self.function}+{self.each.at:#x}: {self.each.text}")

    def unknown(self) -> Unknown:
        return Unknown(f"{self.function}+{self.each.at:#x}: {self.each.text}")

    # Operands.

    def register(self, operand: str) -> tuple[str, int] | None:
        found = re.match(r"\*?%(\w+)", operand)
        return REGISTERS.get(found[1]) if found is not None else None

    def parts(self, operand: str) -> tuple[list[Value], int]:
        """The registers of an address and its constant part."""
        found = re.match(r"\*?(?:%[ef]s:)?(-?0x[0-9a-f]+|-?\d+)?\(([^)]*)\)", operand)
        if found is None:
            raise self.unknown()
        values = []
        for word in found[2].split(","):
            if word.startswith("%") and word not in ("%rip", "%riz"):
                place = self.register(word)
                if place is None:
                    raise self.unknown()
                values.append(self.state.registers[place[0]])
        return values, int(found[1] or "0", 0)

    def calculated(self, operand: str) -> Value:
        values, constant = self.parts(operand)
        return moved(values[0] if len(values) == 1 and not re.search(r"\(,", operand) else computed(values), constant)

    def address(self, operand: str) -> Value:
        value = self.calculated(operand)
        mask = re.search(r"\{%(k\d)\}", " ".join(self.each.operands))
        if value[0] >= SECRET:
            self.decision("address")
        if mask is not None and self.state.registers[mask[1]][0] >= SECRET:
            self.decision("mask")
        return value

    def load(self, at: Value, size: int) -> Value:
        kind, place = at
        if kind == STACK:
            frame, offset, exact = place  # type: ignore[misc]
            if not exact:
                held = [v for (f, o), v in self.state.stack.items() if f == frame and o >= offset]
                return max([HIDDEN, *held], key=lambda value: value[0])
            values = [self.state.stack.get((frame, offset + i), HIDDEN) for i in range(size)]
            result = values[0]
            for value in values[1:]:
                result = joined(result, value)
            return result
        if kind == STREAM:
            inside = isinstance(place, int) and 0 <= place - BLOCK_OFFSET <= BLOCK_BYTES - size
            return NOTHING if inside else HIDDEN
        return {PUBLIC: NOTHING, TABLE: (ROW, None)}.get(kind, HIDDEN)

    def store(self, at: Value, size: int | None, value: Value, *, partly: bool = False) -> None:
        """`size` None: nobody knows how many bytes from there on."""
        kind, place = at
        if kind == STACK:
            frame, offset, exact = place  # type: ignore[misc]
            if value[0] == VECTOR:
                self.analysis.findings.spills.add(f"{self.function}+{self.each.at:#x}: {self.each.text}")
            if frame == "aligned" and exact and offset + (size or 1) > 0:
                raise self.unknown()  # it would lie in the frame above
            if exact and size is not None and not partly:
                self.state.stack |= {(frame, offset + i): value for i in range(size)}
            else:
                for other in [key for key in self.state.stack if key[0] == frame and key[1] >= offset]:
                    self.state.stack[other] = joined(self.state.stack[other], value)
            return
        if kind == STREAM:
            inside = isinstance(place, int) and size is not None and place + size <= BLOCK_OFFSET
            room = SECRET if inside else PUBLIC
        else:
            room = {PUBLIC: PUBLIC, EITHER: PUBLIC, TABLE: ROW}.get(kind, VECTOR)
        if min(value[0], SECRET) > room or value[0] == STACK:
            self.decision("a secret, or a pointer to one, into public memory")

    def get(self, operand: str, size: int) -> Value:
        if operand.startswith("$"):
            return NOTHING
        place = self.register(operand)
        if place is not None:
            return self.state.registers[place[0]]
        if re.fullmatch(r"%fs:0x[0-9a-f]+", operand):  # the stack protector's number
            return NOTHING
        return self.load(self.address(operand), size)

    def set(self, operand: str, size: int, value: Value) -> None:
        place = self.register(operand)
        if place is None:
            self.store(self.address(operand), size, value)
            return
        name, width = place
        if name[0] != "v" and value[0] == VECTOR:
            self.leaving()
            value = HIDDEN
        if width < 4 and name[0] not in "vk":
            value = joined((self.state.registers[name][0], None), (value[0], None)) if value[0] != STACK else HIDDEN
        self.state.registers[name] = value

    # Instructions.

    def take(self) -> bool:
        """Whether the next instruction may follow."""
        name, operands = self.each.name, self.each.operands
        if name in FREE and (name != "xchg" or operands[0] == operands[1]):
            return name != "ud2"
        if name in ("ret", "retq"):
            return False
        if name.startswith("j"):
            return self.jump()
        if name in ("call", "callq"):
            self.call()
            return not self.each.symbol.startswith("__stack_chk_fail")
        if name in ("leave", "leaveq"):
            self.state.registers["rsp"] = self.state.registers["rbp"]
            self.pop("%rbp")
            return True
        if name == "rep":
            self.repeat()
            return True
        if any(re.search(r"%([xyz]mm|k)\d", operand) for operand in operands):
            self.vector()
            return True
        self.general()
        return True

    def jump(self) -> bool:
        target = self.each.operands[0]
        if self.each.name != "jmp" and self.state.flags >= SECRET:
            self.decision("branch")
        if target.startswith("*"):
            value = self.get(target, 8)
            if value[0] >= SECRET:
                self.decision("jump")
            if self.analysis.cases:
                self.jumps += self.analysis.cases
            elif self.analysis.taken:
                for at in self.analysis.taken:
                    self.leave_for(at)
            else:
                raise self.unknown()
            return False
        at = int(target.split()[0], 16)
        if self.each.symbol:
            if self.each.name != "jmp":
                raise self.unknown()
            self.call()
        elif self.analysis.where.get(at, ("", 0))[0] == self.function:
            self.jumps.append(at)
        else:
            self.leave_for(at)
        return self.each.name != "jmp"

    def leave_for(self, at: int) -> None:
        """A call in the last place: the other function finds the same arguments."""
        if self.state.registers["rsp"] != (STACK, ("entry", 0, True)):
            raise self.unknown()
        state = self.state.copy()
        state.stack = {key: value for key, value in state.stack.items() if key[0] == "entry" and key[1] >= 0}
        self.analysis.enter(at, state)

    def call(self) -> None:
        called = re.sub(r"(@PLT)?[-+]0x[0-9a-f]+$", "", self.each.symbol)
        registers = self.state.registers
        if called == "__stack_chk_fail":
            return
        if called not in LIBRARY:
            self.call_ours(called)
            return
        to, second, third = (registers[name] for name in ARGUMENTS[:3])
        size = second if called == "explicit_bzero" else third
        if to[0] >= SECRET or size[0] >= SECRET:
            self.decision("call")
        value = NOTHING
        if called == "memset":
            value = second
        elif called != "explicit_bzero":
            if second[0] >= SECRET:
                self.decision("call")
            value = self.load(second if second[0] != STACK else (STACK, (*second[1][:2], False)), 8)  # type: ignore[index]
        self.store(to, None, value)
        self.returned(to if called != "explicit_bzero" else HIDDEN)

    def call_ours(self, called: str) -> None:
        """One of our exported functions that sees nothing but what is public."""
        kinds = next((each for name, each in self.analysis.signatures.items() if re.fullmatch(name, called)), [SECRET])
        if max(kinds) > PUBLIC or len(kinds) > len(ARGUMENTS):
            raise self.unknown()
        if any(self.state.registers[name][0] != PUBLIC for name in ARGUMENTS[: len(kinds)]):
            self.decision("call")
        self.returned(NOTHING)

    def returned(self, value: Value) -> None:
        """What a called function leaves behind: nobody knows what is in the registers that it need not keep."""
        for name in self.state.registers:
            if name not in KEPT:
                self.state.registers[name] = (VECTOR, None) if name[0] == "v" else HIDDEN
        self.state.flags = SECRET
        self.state.registers["rax"] = value

    def repeat(self) -> None:
        registers = self.state.registers
        if registers["rcx"][0] >= SECRET:
            self.decision("size")
        if self.each.text.startswith("rep stos"):
            value = registers["rax"]
        elif self.each.text.startswith("rep movs"):
            at = registers["rsi"]
            value = self.load(at if at[0] != STACK else (STACK, (*at[1][:2], False)), 8)  # type: ignore[index]
            registers["rsi"] = computed([at, NOTHING])
        else:
            raise self.unknown()
        if registers["rdi"][0] >= SECRET:
            self.decision("address")
        self.store(registers["rdi"], None, value)
        registers["rdi"] = computed([registers["rdi"], NOTHING])
        registers["rcx"] = NOTHING

    def push(self, value: Value) -> None:
        self.state.registers["rsp"] = moved(self.state.registers["rsp"], -8)
        self.store(self.state.registers["rsp"], 8, value)

    def pop(self, operand: str) -> None:
        value = self.load(self.state.registers["rsp"], 8)
        self.state.registers["rsp"] = moved(self.state.registers["rsp"], 8)
        self.set(operand, 8, value)

    def size(self) -> int:
        sizes = [place[1] for operand in self.each.operands if (place := self.register(operand)) is not None]
        if sizes and self.each.name != "lea":
            return sizes[-1]
        return SUFFIXES.get(self.each.name[-1], 8)

    def general(self) -> None:
        name, operands, size = self.each.name, self.each.operands, self.size()
        state = self.state
        widening = re.fullmatch(r"mov[sz]([bwl])[wlq]|movslq|cltq|cqto|cltd|cwtl", name)
        if widening is not None:
            if not operands:  # within rax, or from rax to rdx
                state.registers["rdx"] = joined(state.registers["rdx"], state.registers["rax"])
                return
            small = SUFFIXES[widening[1] or "l"]
            value = self.get(operands[0], small)
            self.set(operands[1], size, value if value[0] != STACK else HIDDEN)
            return
        if re.fullmatch("set" + CONDITION, name):
            self.set(operands[0], 1, (state.flags, None))
            return
        if re.fullmatch("cmov" + CONDITION, name):
            value = joined(self.get(operands[0], size), self.get(operands[1], size))
            self.set(operands[1], size, computed([value, (state.flags, None)]) if state.flags else value)
            return
        if name not in GENERAL and name[:-1] in GENERAL and name[-1] in SUFFIXES:
            name = name[:-1]
        if name not in GENERAL:
            raise self.unknown()
        if name == "push":
            self.push(self.get(operands[0], 8))
        elif name == "pop":
            self.pop(operands[0])
        elif name == "lea":
            self.set(operands[1], size, self.calculated(operands[0]))
        elif name in ("mov", "movabs"):
            self.set(operands[1], size, self.get(operands[0], size))
        elif name == "xchg":
            a, b = self.get(operands[0], size), self.get(operands[1], size)
            self.set(operands[0], size, b)
            self.set(operands[1], size, a)
        elif name in ("cmp", "test"):
            self.compare([self.get(operand, size) for operand in operands])
        else:
            self.calculate(name, size)

    def compare(self, values: list[Value]) -> None:
        """Addresses are public."""
        if any(value[0] == VECTOR for value in values):
            self.leaving()
        self.state.flags = SECRET if any(value[0] >= SECRET for value in values) else PUBLIC

    def calculate(self, name: str, size: int) -> None:
        operands = self.each.operands
        into = operands[-1]
        if name in ("xor", "sub") and operands[0] == into and self.register(into):
            self.state.flags = PUBLIC
            self.set(into, 8, NOTHING)
            return
        values = [self.get(operand, size) for operand in operands]
        constant = int(operands[0][1:], 0) if operands[0].startswith("$") else None
        if constant is not None and constant >= 1 << 63:
            constant -= 1 << 64
        if name in ("add", "sub") and constant is not None and size == 8:
            result = moved(values[-1], constant if name == "add" else -constant)
        elif name == "and" and into == "%rsp" and constant is not None:
            if values[-1][1][0] != "entry":  # type: ignore[index]
                raise self.unknown()
            result = (STACK, ("aligned", 0, True))  # its bytes lie below those of the entry's frame
        elif name == "sub" and values[0][0] == STACK and values[1][0] == STACK:
            result = NOTHING
        else:
            result = computed(values)
        if name == "imul" and len(operands) == 1:
            raise self.unknown()
        if name in ("adc", "sbb"):
            result = computed([result, (self.state.flags, None)])
        if name not in ("not", "bswap"):
            self.compare([*values, (self.state.flags if name in ("adc", "sbb", "inc", "dec") else PUBLIC, None)])
        self.set(into, size, result)

    def vector(self) -> None:
        name, operands = self.each.name, self.each.operands
        into = operands[-1]
        bare = [re.sub(r"\{[^}]*\}", "", operand) for operand in operands]
        place = self.register(into)
        sizes = [found[1] for operand in operands if (found := self.register(operand)) is not None]
        if TO_FLAGS.fullmatch(name):
            values = [self.get(operand, max(sizes)) for operand in operands]
            self.compare([(VECTOR, None) if value[0] == SECRET else value for value in values])
            return
        move = MOVES.match(name) is not None and len(operands) == 2
        size = SMALL_LOADS.get(name, max(sizes))
        masks = [self.state.registers[mask] for mask in re.findall(r"\{%(k[1-7])\}", into)]
        values = [self.get(operand, 8 if "{1to" in operand else size) for operand in operands[:-1]]
        partial = name in ("movhps", "movlps", "vmovhps", "vmovlps", "movhpd", "movlpd", "movss", "movsd")
        merges = (masks and "{z}" not in into) or name.startswith(("vpternlog", "vpgather", "vgather")) or partial
        legacy = not name.startswith(("v", "k")) and not move and name not in ("pshufd", "aeskeygenassist")
        if place is not None and (merges or legacy):
            values.append(self.state.registers[place[0]])
        if "xor" in name and len({*bare[-2:], *bare[-3:]}) == 1 and not masks:
            values = [NOTHING]
        pointer = move and len(values) == 1 and name in ("vmovq", "movq")  # it may be one that goes by
        value = values[0] if pointer else computed([*values, *masks])
        if value[0] == SECRET:
            value = (VECTOR, None)
        if place is None:
            if not move and name not in SMALL_STORES and not name.startswith(("vpscatter", "vscatter")):
                raise self.unknown()
            stored = SMALL_STORES.get(name, max(sizes))
            self.store(self.address(into), stored, value, partly=bool(masks) or "scatter" in name)
        else:
            self.set(into, size, value)


def analyse(target: Path, signatures: Mapping[str, list[int]] = SIGNATURES) -> Findings:
    """What goes where in an object file, of which each function is exported or called by one that is."""
    return Analysis(target, signatures).run()
