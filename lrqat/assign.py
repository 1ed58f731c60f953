"""Which grid each weight gets: a default, overrides by pattern, and what stays dense.

    --override 're:.*down_proj=w8g32'     re.match on the module's name, as compressed-tensors reads `re:`
    --override down_proj=q4_k             whole parts of the name: also layers.0.mlp, but layers.1 is not layers.10
    --override layers.0=dense             stays as it is
    --skip REGEX                          the same, re.search

Names are those of the checkpoint (`model.layers.0.mlp.experts.3.up_proj`; Mixtral: `...block_sparse_moe.experts.3.w3`).
The last pattern that matches wins, and --skip beats --override. Linear layers and experts have the default grid; the
embeddings and the head only what an override gives them; routers and norms always stay dense.

`lrqat.plan` applies an assignment to a model.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from lrqat.errors import LrqatError
from lrqat.grid import Grid

DENSE = "dense"


@dataclass(frozen=True)
class Rule:
    """One --override or --skip.

    Attributes:
        flag: as it was given, for errors.
        matches: tells whether a module's name is meant.
        grid: None: dense.
    """

    flag: str
    matches: Callable[[str], bool]
    grid: Grid | None

    @classmethod
    def override(cls, text: str) -> Rule:
        """Read PATTERN=GRID."""
        flag = f"--override {text!r}"
        pattern, _, grid = text.rpartition("=")
        if not pattern.removeprefix("re:") or not grid:
            raise LrqatError(f"{flag}: expected PATTERN=GRID, for example down_proj=q4_k or 're:.*down_proj=w8g32'")
        try:
            found = None if grid == DENSE else Grid.parse(grid)
        except LrqatError as error:
            raise LrqatError(f"{flag}: {error}, or {DENSE}") from None
        if pattern.startswith("re:"):
            regex = compiled(pattern.removeprefix("re:"), flag)
            return cls(flag, lambda module: regex.match(module) is not None, found)
        parts = f".{pattern.removesuffix('.weight').strip('.')}."
        return cls(flag, lambda module: parts in f".{module}.", found)

    @classmethod
    def skip(cls, pattern: str) -> Rule:
        """Read a --skip."""
        flag = f"--skip {pattern!r}"
        regex = compiled(pattern, flag)
        return cls(flag, lambda module: regex.search(module) is not None, None)


def compiled(pattern: str, flag: str) -> re.Pattern[str]:
    """The regular expression, or one line that says why not."""
    try:
        return re.compile(pattern)
    except re.error as error:
        raise LrqatError(f"{flag}: {pattern!r} is no regular expression ({error})") from None


@dataclass(frozen=True)
class Assignment:
    """The default grid and the rules, of which the last that matches wins."""

    grid: Grid
    rules: tuple[Rule, ...] = ()

    @classmethod
    def make(cls, grid: Grid, overrides: Sequence[str] = (), skip: Sequence[str] = ()) -> Assignment:
        """From the flags' values."""
        return cls(grid, (*map(Rule.override, overrides), *map(Rule.skip, skip)))

    def rule(self, parameter: str) -> Rule | None:
        """The rule that decides about a parameter."""
        module = parameter.removesuffix(".weight")
        return next((rule for rule in reversed(self.rules) if rule.matches(module)), None)

    def of(self, parameter: str) -> Grid | None:
        """The grid of a linear layer's or an expert's parameter; None: dense."""
        rule = self.rule(parameter)
        return self.grid if rule is None else rule.grid
