r"""Regular expressions from a stranger's file, matched in time linear in the name.

Quantisation configs select modules by `re:` patterns. Python's own engine backtracks and cannot be
interrupted, so one `(a+)+$` in a downloaded config would hang the loader. This one compiles the
pattern to a nondeterministic automaton and walks it as a lazily built deterministic one: a step per
character, whatever the pattern. It answers what `re.match(pattern, name) is not None` answers, for
the syntax below, and refuses the rest by name. Must never know of modules or quantisation.

Syntax: literals, `.`, classes `[a-z]`, `\d \w \s` and their opposites, groups, `|`, `* + ?` and
`{m,n}` (lazy or not), `^ $ \A \Z`, and lookaheads `(?=...)` `(?!...)` at the very start.
"""

from __future__ import annotations

import string
from collections.abc import Callable, Iterable
from dataclasses import dataclass

from camelid.errors import Unsupported
from camelid.json_file import shorten

_MAX_LENGTH = 512  # characters; the longest pattern llm-compressor writes has 60
_MAX_STATES = 1024  # {m,n} copies its operand: `((a{99}){99}){99}` must not fill the memory
_MAX_DEPTH = 32  # nested groups
# Work spent on building deterministic states, over all patterns of one config: some seconds. Honest
# lists need a tenth of it, whatever the number of names.
_MAX_WORK = 20_000_000
_STATE_WORK = 500  # what a state costs besides its edges; bounds their number, hence the memory

_WORD = frozenset(string.ascii_letters + string.digits + "_")
_SETS: dict[str, Callable[[str], bool]] = {
    "d": str.isdecimal,
    "D": lambda c: not c.isdecimal(),
    "w": lambda c: c.isalnum() or c == "_",
    "W": lambda c: not (c.isalnum() or c == "_"),
    "s": str.isspace,
    "S": lambda c: not c.isspace(),
}
_CONTROL = {"n": "\n", "t": "\t", "r": "\r", "f": "\f", "v": "\v"}

Test = Callable[[str], bool]


@dataclass(frozen=True)
class _Node:
    """One node of the parsed pattern."""

    kind: str  # test, sequence, choice, repeat, start, end
    parts: tuple[_Node, ...] = ()
    test: Test | None = None
    low: int = 0
    high: int | None = None


class Budget:
    """What is left of the work that the patterns sharing this may cause."""

    def __init__(self, work: int = _MAX_WORK) -> None:
        self.left = work


class Patterns:
    """A compiled list; `match` agrees with `any(re.match(pattern, text) for pattern in list)`.

    All patterns without lookaheads are walked as one automaton, so a hundred cost what one does.
    """

    def __init__(self, patterns: Iterable[str], budget: Budget | None = None) -> None:
        """Compile.

        Raises:
            Unsupported: If a pattern is longer, larger or richer than this engine takes.
        """
        budget = budget or Budget()
        self._united = _Automaton(budget)
        self._guarded: list[list[tuple[bool, _Automaton]]] = []
        for pattern in dict.fromkeys(patterns):
            if len(pattern) > _MAX_LENGTH:
                raise _refusal(pattern, f"has more than {_MAX_LENGTH} characters")
            lookaheads, body = _Parser(pattern).parse()
            if not lookaheads:
                self._united.add(body, pattern)
                continue
            parts = [(wanted, _Automaton(budget)) for wanted, _ in lookaheads]
            for (_, automaton), (_, node) in zip(parts, lookaheads, strict=True):
                automaton.add(node, pattern)
            parts.append((True, _Automaton(budget)))
            parts[-1][1].add(body, pattern)
            self._guarded.append(parts)

    def match(self, text: str) -> bool:
        """Tell whether any pattern matches at the start of `text`."""
        return self._united.accepts(text) or any(
            all(automaton.accepts(text) == wanted for wanted, automaton in parts)
            for parts in self._guarded
        )


def _refusal(pattern: str, why: str) -> Unsupported:
    return Unsupported(
        f"[quantization] the pattern {shorten(pattern)} {why}. Supported: literals, classes, "
        "groups, alternation, repetition, anchors, and lookaheads at the start."
    )


class _Parser:
    """Recursive descent over the pattern; depth is bounded, every step consumes a character."""

    def __init__(self, pattern: str) -> None:
        self.pattern = pattern
        self.at = 0
        self.depth = 0

    def parse(self) -> tuple[list[tuple[bool, _Node]], _Node]:
        lookaheads = []
        while True:
            if self.take("^"):  # before a lookahead it changes nothing: both stand at the start
                continue
            if self.take("(?="):
                wanted = True
            elif self.take("(?!"):
                wanted = False
            else:
                break
            lookaheads.append((wanted, self.choice()))
            self.need(")")
        body = self.choice()
        if self.at < len(self.pattern):
            raise _refusal(self.pattern, f"has an unmatched ')' at {self.at}")
        if lookaheads and body.kind == "choice":  # `(?!a)b|c`: the lookahead belongs to b alone
            raise _refusal(self.pattern, "has a lookahead in one alternative")
        return lookaheads, body

    def peek(self) -> str:
        return self.pattern[self.at : self.at + 1]

    def take(self, text: str) -> bool:
        if not self.pattern.startswith(text, self.at):
            return False
        self.at += len(text)
        return True

    def need(self, text: str) -> None:
        if not self.take(text):
            raise _refusal(self.pattern, f"lacks {text!r} at {self.at}")

    def next(self) -> str:
        character = self.peek()
        if not character:
            raise _refusal(self.pattern, "ends too early")
        self.at += 1
        return character

    def choice(self) -> _Node:
        self.depth += 1
        if self.depth > _MAX_DEPTH:
            raise _refusal(self.pattern, f"nests more than {_MAX_DEPTH} groups")
        branches = [self.sequence()]
        while self.take("|"):
            branches.append(self.sequence())
        self.depth -= 1
        return branches[0] if len(branches) == 1 else _Node("choice", tuple(branches))

    def sequence(self) -> _Node:
        parts = []
        while self.peek() not in ("", "|", ")"):
            parts.append(self.repeated(self.atom()))
        return _Node("sequence", tuple(parts))

    def atom(self) -> _Node:
        character = self.next()
        if character == "(":
            if self.take("?") and not self.take(":"):
                raise _refusal(self.pattern, f"has an unknown group '(?' at {self.at - 2}")
            inside = self.choice()
            self.need(")")
            return inside
        if character == "[":
            return _Node("test", test=self.character_class())
        if character == ".":
            return _Node("test", test=lambda c: c != "\n")
        if character == "^":
            return _Node("start")
        if character == "$":
            return _Node("end")
        if character in "*+?":
            raise _refusal(self.pattern, f"repeats nothing at {self.at - 1}")
        if character == "\\":
            if self.take("A"):
                return _Node("start")
            if self.take("Z"):
                return _Node("end")
            return _Node("test", test=self.escape())
        return _Node("test", test=_equals(character))

    def escape(self) -> Test:
        character = self.next()
        if character in _SETS:
            return _SETS[character]
        return _equals(self.escaped(character))

    def escaped(self, character: str) -> str:
        if character in _CONTROL:
            return _CONTROL[character]
        if character in _WORD:
            raise _refusal(self.pattern, f"has the unknown escape '\\{character}'")
        return character

    def character_class(self) -> Test:
        negated = self.take("^")
        tests: list[Test] = []
        first = True
        while first or self.peek() != "]":
            first = False
            low = self.next()
            if low == "\\":
                low = self.next()
                if low in _SETS:
                    tests.append(_SETS[low])
                    continue
                low = self.escaped(low)
            if self.peek() == "-" and self.pattern[self.at + 1 : self.at + 2] not in ("]", ""):
                self.next()
                high = self.next()
                if high == "\\":
                    high = self.escaped(self.next())
                if high < low:
                    raise _refusal(self.pattern, f"has the empty range {low}-{high}")
                tests.append(_between(low, high))
            else:
                tests.append(_equals(low))
        self.need("]")
        return lambda c: any(test(c) for test in tests) != negated

    def repeated(self, node: _Node) -> _Node:
        count = self.count()
        if count is None:
            return node
        if node.kind in ("start", "end"):
            raise _refusal(self.pattern, f"repeats an anchor at {self.at - 1}")
        self.take("?")  # lazy: another path to the same answer
        if self.peek() in ("*", "+", "?") or (self.peek() == "{" and self.count() is not None):
            raise _refusal(self.pattern, f"repeats a repetition at {self.at}")
        return _Node("repeat", (node,), low=count[0], high=count[1])

    def count(self) -> tuple[int, int | None] | None:
        for sign, bounds in (("*", (0, None)), ("+", (1, None)), ("?", (0, 1))):
            if self.take(sign):
                return bounds
        if self.peek() != "{":
            return None
        body, brace, _ = self.pattern[self.at + 1 :].partition("}")
        low, comma, high = body.partition(",")
        digits = all(not part or (part.isascii() and part.isdigit()) for part in (low, high))
        if not brace or not digits or not (low or comma):
            return None  # `{` stands for itself, as in re
        self.at += len(body) + 2
        least = int(low or 0)
        most = (int(high) if high else None) if comma else least
        if max(least, most or 0) > _MAX_STATES or (most is not None and most < least):
            raise _refusal(self.pattern, f"repeats {{{body}}}")
        return least, most


def _equals(character: str) -> Test:
    return lambda c: c == character


def _between(low: str, high: str) -> Test:
    return lambda c: low <= c <= high


class _State:
    """A deterministic state: the set of states the automaton may be in."""

    __slots__ = ("accepts", "accepts_at_end", "members", "next")

    def __init__(self, members: frozenset[int], accepts: bool, accepts_at_end: bool) -> None:
        self.members = members
        self.accepts = accepts
        self.accepts_at_end = accepts_at_end
        self.next: dict[str, _State] = {}


class _Automaton:
    """Thompson's automaton of some patterns, with the deterministic states met so far."""

    def __init__(self, budget: Budget) -> None:
        self.budget = budget
        # State s consumes a character when tests[s] holds and goes to s's single edge; without a
        # test its edges are free, guarded by an anchor where there is one.
        self.tests: list[Test | None] = []
        self.edges: list[list[int]] = []
        self.anchors: list[str] = []
        self.goal = self.state()
        self.begins: list[int] = []
        self.states: dict[frozenset[int], _State] = {}
        self.start: _State | None = None
        self.most_states = 1
        self.pattern = ""

    def add(self, node: _Node, pattern: str) -> None:
        """Accept what `node` accepts, too."""
        self.pattern = pattern
        self.most_states = len(self.tests) + _MAX_STATES
        self.begins.append(self.build(node, self.goal))
        self.start = None

    def state(self, test: Test | None = None, anchor: str = "") -> int:
        if self.tests and len(self.tests) >= self.most_states:
            raise _refusal(self.pattern, f"needs more than {_MAX_STATES} states")
        self.tests.append(test)
        self.edges.append([])
        self.anchors.append(anchor)
        return len(self.tests) - 1

    def build(self, node: _Node, then: int) -> int:
        """Add states that accept `node` and continue at `then`; return the first."""
        if node.kind == "sequence":
            for part in reversed(node.parts):
                then = self.build(part, then)
            return then
        if node.kind == "repeat":
            return self.repeat(node, then)
        first = self.state(node.test, "" if node.kind in ("test", "choice") else node.kind)
        if node.kind == "choice":
            self.edges[first] = [self.build(part, then) for part in node.parts]
        else:
            self.edges[first] = [then]
        return first

    def repeat(self, node: _Node, then: int) -> int:
        (part,) = node.parts
        if node.high is None:
            loop = self.state()
            self.edges[loop] = [self.build(part, loop), then]
            then = loop
        else:
            after = then
            for _ in range(node.high - node.low):
                skip = self.state()
                self.edges[skip] = [self.build(part, then), after]
                then = skip
        for _ in range(node.low):
            self.state()  # counts copies of empty operands too
            then = self.build(part, then)
        return then

    def closure(
        self, states: Iterable[int], *, at_start: bool = False, at_end: bool = False
    ) -> frozenset[int]:
        """Return all states reached without consuming a character."""
        seen = set(states)
        todo = list(seen)
        while todo:
            state = todo.pop()
            anchor = self.anchors[state]
            if self.tests[state] is not None or (anchor == "start" and not at_start):
                continue
            if anchor == "end" and not at_end:
                continue
            for edge in self.edges[state]:
                if edge not in seen:
                    seen.add(edge)
                    todo.append(edge)
        self.spend(len(seen))
        return frozenset(seen)

    def spend(self, work: int) -> None:
        self.budget.left -= work
        if self.budget.left < 0:
            raise _refusal(self.pattern, "or its list costs more than any real one to match")

    def deterministic(self, members: frozenset[int], *, at_start: bool = False) -> _State:
        self.spend(_STATE_WORK)
        ends = self.closure(members, at_start=at_start, at_end=True)
        return _State(members, self.goal in members, self.goal in ends)

    def step(self, state: _State, character: str) -> _State:
        self.spend(len(state.members))
        moved = [
            self.edges[member][0]
            for member in state.members
            if (test := self.tests[member]) is not None and test(character)
        ]
        members = self.closure(moved)
        found = self.states.get(members)
        if found is None:
            found = self.states[members] = self.deterministic(members)
        state.next[character] = found
        return found

    def accepts(self, text: str) -> bool:
        if self.start is None:
            members = self.closure(self.begins, at_start=True)
            self.start = self.deterministic(members, at_start=True)
        state = self.start
        for character in text:
            if state.accepts:
                return True
            if not state.members:
                return False
            state = state.next.get(character) or self.step(state, character)
        return state.accepts_at_end
