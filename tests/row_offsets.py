"""Whether a kernel computes its row offsets in 64 bits, read from its Triton IR.

A row offset, a row's number times a stride, passes 2**31 for tensors that fit a GPU. This follows every
pointer offset back to what it was computed from, by addition, multiplication, selection, division and
loops, and refuses the 32-bit products and sums on the way that can overflow:

- any product with an argument of the kernel, which may be a stride, or of two unbounded numbers;
- a second product with a constant: a row's number is one (``program * BLOCK + range``), an offset two;
- a sum that a loop grows by an unbounded step;
- a product narrowed to 32 bits.

What it cannot see: ``program * CONSTANT`` used as it is. That is how the number of a row or a column is
built, and looks the same as an offset of rows whose length is a constant.
"""

import re
from dataclasses import dataclass, field

CONSTANT, BOUNDED, INDEX, PRODUCT = range(4)
"""One number known to the compiler, a range of such, an unbounded number, and one times something."""

_LOCATION = re.compile(r"\s*loc\((?:[^()\"]|\"[^\"]*\"|\([^()]*\))*\)")
_ALIAS = re.compile(r"^(#loc\d*) = (.*)$", re.MULTILINE)
_NAME = re.compile(r"%[\w$.-]+(?:#\d+)?")
_OPERATION = re.compile(r"^(?:(%[^=]*) = )?\"?([a-z_]\w*\.\w+)\"?(.*)$")
_SPREAD = {"tt.splat", "tt.broadcast", "tt.expand_dims", "tt.reshape", "arith.extsi", "arith.extui"}
_DIVIDED = {"divsi", "divui", "floordivsi", "ceildivsi", "ceildivui", "shrsi", "shrui"}
_REMAINDER = {"arith.remsi", "arith.remui"}
_LOOPS = ("scf.for", "scf.while")
_SUMS = ("arith.addi", "arith.subi")
_LEAVES = {"tt.load": INDEX, "tt.get_program_id": INDEX, "tt.get_num_programs": INDEX,
           "tt.make_range": BOUNDED, "arith.constant": CONSTANT, "arith.cmpi": BOUNDED,
           "arith.cmpf": BOUNDED, "argument": INDEX}  # fmt: skip


@dataclass(eq=False)
class _Value:
    operation: str
    line: str
    operands: list["_Value"] = field(default_factory=list)
    place: str = ""
    """File and line of the source."""
    rank: int = CONSTANT

    @property
    def narrow(self) -> bool:
        """Whether it is an integer of less than 64 bits."""
        bits = re.search(r"[<x ]i(\d+)\W*$", self.line)
        return bits is not None and int(bits[1]) < 64


@dataclass
class _Region:
    """What opened it, whose results its terminator gives, and what its next round begins with."""

    owner: str
    names: dict[str, _Value]
    results: list[_Value] = field(default_factory=list)
    carried: list[_Value] = field(default_factory=list)


class _Reader:
    """The values of a module in their textual form; names are scoped by region."""

    def __init__(self, ttir: str) -> None:
        self.values: list[_Value] = []
        self.offsets: list[_Value] = []
        self.unread: list[str] = []
        self.regions = [_Region("", {})]
        self._places = dict(_ALIAS.findall(ttir))
        self._place = ""
        for line in ttir.splitlines():
            self._place = self._source(line)
            line = _LOCATION.sub("", line).strip()
            if line and not line.startswith(("#", "//", "module")):
                self._read(line)

    def _source(self, text: str) -> str:
        """The file and line that a location leads to, through the aliases it is made of."""
        if found := re.search(r"([^/\"]+)\":(\d+):", text):
            return f"{found[1]}:{found[2]}"
        alias = re.search(r"#loc\d*", text)
        return self._source(self._places.get(alias[0], "")) if alias else ""

    def _new(self, operation: str, line: str, operands: list[_Value] | None = None) -> _Value:
        self.values.append(_Value(operation, line, operands or [], self._place))
        return self.values[-1]

    def _find(self, text: str) -> list[_Value]:
        found = []
        for name in _NAME.findall(text):
            scope = next((r.names for r in reversed(self.regions) if name in r.names), None)
            if scope is None:
                self.unread.append(f"{name} in: {text}")
            else:
                found.append(scope[name])
        return found

    def _read(self, line: str) -> None:
        if line.startswith("}"):
            closed = self.regions.pop()
            if line.endswith("{"):  # the second region of an if or a while
                carried = closed.carried if "do" in line else []
                self.regions.append(_Region(closed.owner + " again", {}, closed.results, carried))
        elif line.startswith("tt.func"):
            head = re.findall(r"(%[\w$.-]+): ([^,{)]+)", line)
            names = {name: self._new("argument", f"{name} : {kind}") for name, kind in head}
            self.regions.append(_Region("tt.func", names))
        elif line.startswith("^"):
            self._label(line)
        elif match := _OPERATION.match(line):
            self._operation(line, *match.groups())
        else:
            self.unread.append(line)

    def _label(self, line: str) -> None:
        """Parameters of a block: of a reduction's body, of a loop's second half, or unknown."""
        region = self.regions[-1]
        parameters = _NAME.findall(line.split("//")[0])
        if region.owner == "scf.while again":
            region.names.update(zip(parameters, region.results, strict=False))
        elif region.owner.split(" ")[0] in ("tt.reduce", "tt.scan", "tt.map_elementwise"):
            region.names.update({name: self._new("tt.load", line) for name in parameters})
        elif parameters:
            self.unread.append(line)

    def _operation(self, line: str, given: str | None, kind: str, rest: str) -> None:
        if kind in ("scf.yield", "scf.condition"):
            self._end(kind, self._find(rest))
            return
        names, carried = self._loop(line, kind, rest) if kind in _LOOPS else ({}, [])
        nested = kind in _LOOPS or kind == "scf.if"
        operands = [] if nested else self._find(rest)
        made = _results(given)
        results = [self._new("joined" if nested else kind, line, list(operands)) for _ in made]
        if kind == "scf.for":  # of no rounds, the results are what it began with
            for value, start in zip(results, carried, strict=True):
                value.operands.append(start)
        if kind == "tt.addptr":
            self.offsets.append(operands[1])
        self.regions[-1].names.update(zip(made, results, strict=True))
        if line.endswith("{"):
            self.regions.append(_Region(kind, names, results, carried))

    def _loop(self, line: str, kind: str, rest: str) -> tuple[dict[str, _Value], list[_Value]]:
        """The names inside a loop, and what it carries from round to round."""
        pairs = re.findall(r"(%[\w$.-]+) = (%[\w$.-]+(?:#\d+)?)", rest)
        names = {}
        if kind == "scf.for":
            bounds = self._find(rest.split(" iter_args")[0].split(" = ", 1)[1])
            names[pairs.pop(0)[0]] = self._new("counter", line.rstrip(" {"), bounds)
        carried = [self._new("carried", f"{a} = {b}", self._find(b)) for a, b in pairs]
        for value, kept in zip(carried, _types(rest), strict=True):
            value.line += f" : {kept}"
        return names | dict(zip((inside for inside, _ in pairs), carried, strict=True)), carried

    def _end(self, kind: str, given: list[_Value]) -> None:
        """What a region hands to what opened it, and to its own next round."""
        region = self.regions[-1]
        takers = [region.results, region.carried]
        if kind == "scf.condition":
            given, takers = given[1:], [region.results]
        elif region.owner == "scf.while again":
            takers = [region.carried]
        for values in takers:
            for value, operand in zip(values, given, strict=False):
                value.operands.append(operand)


def _results(given: str | None) -> list[str]:
    """The names of an operation's results: of ``%a``, of ``%a, %b``, or of ``%a:2``, which are numbered."""
    names = []
    for name, count in re.findall(r"(%[\w$.-]+)(?::(\d+))?", given or ""):
        names += [f"{name}#{i}" for i in range(int(count))] if count else [name]
    return names


def _types(rest: str) -> list[str]:
    """The types of what a loop carries: ``-> (a, b)`` in the head of a for, ``: (a, b) ->`` of a while."""
    found = re.search(r": \((.*)\) ->", rest) or re.search(r"-> \((.*)\)", rest)
    return re.findall(r"(?:[^,<]|<[^>]*>)+", found[1]) if found else []


def _followed(value: _Value) -> list[_Value]:
    """The operands whose overflow would be the value's."""
    kind = value.operation
    if kind in _LEAVES:
        return []
    if kind == "counter":
        return value.operands[::2]
    if kind.split(".")[-1] in _DIVIDED or kind in _REMAINDER:
        return value.operands[:1]
    return value.operands


def _rank(value: _Value) -> int:
    kind = value.operation
    if kind in _LEAVES:
        return _LEAVES[kind]
    ranks = [operand.rank for operand in value.operands]
    highest = max(ranks, default=INDEX)
    if kind in ("arith.muli", "arith.shli"):
        return PRODUCT if highest >= INDEX else highest
    if kind.split(".")[-1] in _DIVIDED:
        return min(ranks[0], INDEX)
    if kind in _REMAINDER or kind == "arith.andi":
        return min(BOUNDED, highest) if min(ranks[-2:]) == CONSTANT else min(highest, INDEX)
    if kind == "counter":
        start, _, step = value.operands
        if highest == CONSTANT:
            return BOUNDED
        return max(start.rank, INDEX if "arith.constant 1 :" in step.line else PRODUCT)
    if kind == "carried":
        moves = any(operand is not value for operand in value.operands[1:])
        return PRODUCT if moves else highest
    if kind in _SPREAD or kind == "joined" or kind.startswith("arith."):
        return highest
    return max(highest, INDEX)


def _argument(value: _Value) -> bool:
    """Whether it is an argument of the kernel, perhaps widened or spread over a tensor."""
    while value.operation in _SPREAD:
        value = value.operands[0]
    return value.operation == "argument"


def _fault(value: _Value) -> str | None:
    kind, operands = value.operation, value.operands
    if kind in ("arith.muli", "arith.shli") and value.narrow:
        first, second = operands
        if _argument(first) or _argument(second):
            return "a 32-bit product with an argument"
        low, high = sorted((first.rank, second.rank))
        if high == INDEX and low != CONSTANT:
            return "a 32-bit product of unbounded numbers"
        if high == PRODUCT:
            return "a 32-bit product of a product"
    if kind == "arith.trunci" and value.narrow and operands[0].rank == PRODUCT:
        return "a product narrowed to 32 bits"
    if kind == "carried" and value.narrow and _step(value) >= INDEX:
        return "a 32-bit sum of unbounded steps"
    return None


def _step(value: _Value) -> int:
    """The rank of what a loop adds to what it carries."""
    leads: dict[int, bool] = {id(value): True}

    def back(one: _Value) -> bool:
        """Whether what the loop carries is part of this."""
        if id(one) not in leads:
            leads[id(one)] = False
            leads[id(one)] = any([back(operand) for operand in _followed(one)])
        return leads[id(one)]

    rank, seen, pending = CONSTANT, {id(value)}, value.operands[1:]
    while pending:
        one = pending.pop()
        if id(one) in seen or not back(one):
            continue
        seen.add(id(one))
        if one.operation in _SUMS:
            rank = max([rank, *(o.rank for o in one.operands if not back(o))])
        pending += _followed(one)
    return rank


def row_offset_faults(ttir: str) -> list[str]:
    """What of a kernel's pointer arithmetic may overflow, an entry for each operation."""
    reader = _Reader(ttir)
    changed = True
    while changed:  # ranks only grow, so that loops settle
        changed = False
        for value in reader.values:
            rank = max(value.rank, _rank(value))
            changed |= rank != value.rank
            value.rank = rank
    faults = [f"not understood: {line}" for line in reader.unread[:1]]
    seen: set[int] = set()
    pending = list(reader.offsets)
    while pending:
        value = pending.pop()
        if id(value) in seen:
            continue
        seen.add(id(value))
        if (fault := _fault(value)) is not None:
            # SSA names are numbered, which differs from one configuration to the next.
            text = re.sub(r"(%\w+?)_\d+\b", r"\1", value.line.split(" = ", 1)[-1])
            faults.append(f"{fault}: {value.place} {text}")
        pending += _followed(value)
    return sorted(set(faults))
