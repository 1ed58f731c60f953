"""An assignment applied to a model: what is decided about each of its matrices, before any weight is loaded.

Refuses patterns that match nothing, a head that is tied, grids that do not divide, ranks that exceed a weight, and
matrices that are in no layer that lrqat knows: nothing is silently left unquantized.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from lrqat.assign import Assignment, Rule
from lrqat.errors import LrqatError
from lrqat.grid import Grid
from lrqat.sites import EMBEDDING, HEAD, ROUTER, TIED_HEAD, TRAINED, UNKNOWN, Site, sites


@dataclass(frozen=True)
class Plan:
    """An assignment applied to a model.

    Attributes:
        sites: linear layers, experts, head and embeddings, by parameter name; also those that stay dense.
        grids: grids of those that are quantized, in the same order.
    """

    sites: dict[str, Site]
    grids: dict[str, Grid]

    @property
    def skipped(self) -> list[str]:
        """Linear layers and experts that are dense on request."""
        kinds = (*TRAINED, UNKNOWN)
        return [name for name, site in self.sites.items() if site.kind in kinds and name not in self.grids]

    @property
    def weights(self) -> int:
        """How many numbers are quantized."""
        return sum(self.sites[name].shape[0] * self.sites[name].shape[1] for name in self.grids)

    def __str__(self) -> str:
        counts = Counter(map(str, self.grids.values()))
        skipped = f"; {len(self.skipped)} skipped" if self.skipped else ""
        return ", ".join(f"{count} weights {grid}" for grid, count in counts.items()) + skipped


def plan(model: Any, assignment: Assignment, rank: int | None = None) -> Plan:
    """Decide about every matrix of a model, weights or none; refuses what cannot be.

    Args:
        model: a transformers causal language model, also on the meta device.
        assignment: what was asked for.
        rank: of the adapters that the trained weights get.
    """
    found = sites(model)
    check_rules(model, assignment, found)
    chosen: dict[str, Site] = {}
    grids: dict[str, Grid] = {}
    for site in found:
        rule = assignment.rule(site.name)
        if site.kind == UNKNOWN and (rule is None or rule.grid is not None):
            raise LrqatError(
                f"{type(model).__name__}: {site.name} {list(site.shape)} is in no linear layer, which lrqat cannot "
                "quantize yet; leave it as it is with --skip"
            )
        if site.kind in (TIED_HEAD, ROUTER):
            continue
        chosen[site.name] = site
        grid = rule.grid if rule else assignment.grid if site.kind not in (HEAD, EMBEDDING) else None
        if grid is not None:
            check_site(site, grid, rule, rank if site.kind in TRAINED else None)
            grids[site.name] = grid
    if not any(chosen[name].kind in TRAINED for name in grids):
        raise LrqatError(f"{type(model).__name__}: no linear layer to quantize; is `--skip` too wide?")
    return Plan(chosen, grids)


def check_rules(model: Any, assignment: Assignment, found: Sequence[Site]) -> None:
    """Refuse rules that match nothing, or nothing that can have a grid."""
    for rule in assignment.rules:
        kinds = {s.kind: s.name.removesuffix(".weight") for s in found if rule.matches(s.name.removesuffix(".weight"))}
        if not kinds:
            raise LrqatError(
                f"{rule.flag}: matches no weight of {type(model).__name__}, whose names are like "
                f"{found[len(found) // 2].name.removesuffix('.weight')}"
            )
        if rule.grid is None:
            continue
        if kinds.keys() == {TIED_HEAD}:
            embedding = next(s.name for s in found if s.kind == EMBEDDING).removesuffix(".weight")
            raise LrqatError(
                f"{rule.flag}: {kinds[TIED_HEAD]} is tied to {embedding}, one tensor for both; "
                f"use --override {embedding}={rule.grid}"
            )
        if kinds.keys() == {ROUTER}:
            raise LrqatError(f"{rule.flag}: {kinds[ROUTER]} is a router, which stays dense; leave this override out")


def check_site(site: Site, grid: Grid, rule: Rule | None, rank: int | None) -> None:
    """Refuse a grid that does not divide, and a rank that exceeds the weight."""
    rows, columns = site.shape
    try:
        grid.columns_per_group(columns, site.name)
    except LrqatError as error:
        raise LrqatError(f"{rule.flag}: {error}" if rule else str(error)) from None
    if rank is not None and rank > min(rows, columns):
        raise LrqatError(f"{site.name}: rank {rank} exceeds {rows}x{columns}; use --rank {min(rows, columns)}")
