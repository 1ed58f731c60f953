"""The plan: a YAML list of rows, each one method on one or more grids.

    grids: [w4g32, w3]                       of rows that name none
    seeds: [0]                               of trained rows that name none
    train: {start: gptq, steps: 180}         keys of `lrqat train` that all trained rows share
    ptq: {}                                  and of `lrqat ptq`
    rows:
      - {name: gptq, ptq: {method: gptq}}
      - {name: lrqat, train: {method: lrqat, rank: 32}}
      - {name: lrqat lr 3e-3, grid: w3, seeds: [0, 1, 2], train: {method: lrqat, lr: 0.003}}
      - {name: lrqat, grid: q4_k_m, train: {grid: q5_0, override: ["down_proj=q4_k"]}}
      - {name: auto-round, peer: peers/auto-round-w4g32}

A row whose flags have a grid of their own is shown beside its `grid`, which then is only a name.

A peer is a directory that a script of benchmarks/peers has left: cost.json and model/, a Hugging Face directory. It
is looked for in OUT. Its `grid`, where given, is the one that it is shown beside: q2_k beside w4g32, for one.
Rows are refused before the first is run, if `lrqat` would not take their flags.
"""

from __future__ import annotations

import contextlib
import io
import re
import tempfile
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from lrqat.cli import make_parser, train_settings
from lrqat.command import with_recipe
from lrqat.errors import LrqatError
from lrqat.grid import Grid
from lrqat.jsonfile import read_json

COMMANDS = ("train", "ptq")
KEYS = {"grids", "seeds", "rows", *COMMANDS}
ROW_KEYS = {"name", "grid", "seeds", "peer", *COMMANDS}
OURS = {"model", "out", "data", "like", "seed", "threads", "config", "json", "resume", "for"}  # not for a row to say
SPENT = ("seconds", "cpu_seconds", "peak_memory_gb", "machine")
COST = ("tool", "version", "method", "grid", "settings", "bits_per_weight", "megabytes", *SPENT)


@dataclass(frozen=True)
class Row:
    """One run.

    Attributes:
        name: as the plan calls it; the same on all grids and seeds.
        grid: the grid, or a name that rows of several are shown beside: a peer's, or one whose flags have their own.
        command: train, ptq or peer.
        settings: keys of `lrqat train` or `lrqat ptq`; of a peer, its cost.json.
        seed: of trained rows.
        peer: a peer's directory.
    """

    name: str
    grid: str
    command: str
    settings: dict[str, Any] = field(default_factory=dict)
    seed: int | None = None
    peer: Path | None = None

    @property
    def label(self) -> str:
        """Name of its directory, and what `--only` looks at."""
        name = re.sub(r"[^\w.+-]+", "_", f"{self.grid}-{self.name}")
        return name if self.seed is None else f"{name}-s{self.seed}"

    @property
    def looks_at_text(self) -> bool:
        """It takes --data; rounding to nearest refuses it."""
        return self.command == "train" or self.settings.get("method", "rtn") != "rtn"

    @property
    def flags(self) -> dict[str, Any]:
        """Its flags, but for those that name files."""
        return {"grid": self.grid, **self.settings} | ({} if self.seed is None else {"seed": self.seed})

    def recipe(self, data: Sequence[str]) -> dict[str, Any]:
        """What `--config` takes."""
        return self.flags | ({"data": list(data)} if self.looks_at_text else {})


def read(path: Path, out: Path, only: str = "") -> list[Row]:
    """The rows of a plan whose label has `only` in it.

    Raises:
        LrqatError: no plan, two rows of one label, a peer that is not there, nothing left.
    """
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise LrqatError(f"{path}: not YAML ({' '.join(str(error).split())})") from None
    content = checked(content, KEYS, str(path))
    rows = [
        row
        for number, said in enumerate(listed(content.get("rows"), dict, f"{path}: rows"), 1)
        for row in expand(said, content, out, f"{path}: row {number}")
    ]
    if twice := [label for label, count in Counter(row.label for row in rows).items() if count > 1]:
        raise LrqatError(f"{path}: {twice[0]} is there twice; give one of them another name")
    kept = set(chosen([row.label for row in rows], only, f"{path}: none of {len(rows)} rows"))
    return [with_cost(row) if row.peer else row for row in rows if row.label in kept]


def chosen(labels: Sequence[str], only: str, none: str) -> list[str]:
    """The labels that `only` is found in.

    Raises:
        LrqatError: it is no regular expression, or found in none of them, of which `none` is the beginning.
    """
    try:
        found = [label for label in labels if re.search(only, label)]
    except re.error as error:
        raise LrqatError(f"--only {only}: no regular expression ({error})") from None
    if not found:
        raise LrqatError(f"{none} has {only!r} in its label{f', as {labels[0]}' if labels else ''}")
    return found


def expand(said: dict[str, Any], common: dict[str, Any], out: Path, where: str) -> Iterator[Row]:
    """A row on each of its grids and seeds."""
    checked(said, ROW_KEYS, where)
    kinds = [key for key in ("peer", *COMMANDS) if key in said]
    if len(kinds) != 1 or not isinstance(said.get("name"), str):
        raise LrqatError(f"{where}: expected a name and one of peer, train and ptq, got {', '.join(said) or 'nothing'}")
    command = kinds[0]
    if command == "peer":
        peer = out / str(said["peer"])
        yield Row(said["name"], str(said.get("grid") or cost_of(peer)["grid"]), "peer", peer=peer)
        return
    settings: dict[str, Any] = {}
    for place, flags in ((f"{command} of all rows", common.get(command)), (where, said[command])):
        settings |= {key.replace("-", "_"): value for key, value in checked(flags or {}, None, place).items()}
    if wrong := OURS & settings.keys():
        raise LrqatError(f"{where}: {min(wrong)} is not for a row's flags; see the plan's own keys and --help")
    if "seeds" in said and command != "train":
        raise LrqatError(f"{where}: seeds: lrqat {command} has none; leave them out")
    seeds = (
        listed(said.get("seeds", common.get("seeds", [0])), int, f"{where}: seeds") if command == "train" else [None]
    )
    for grid in listed(said.get("grid", common.get("grids")), str, f"{where}: grid"):
        for seed in seeds:
            yield Row(said["name"], grid, command, settings, seed)


def cost_of(peer: Path) -> dict[str, Any]:
    """A peer's cost.json, whole."""
    if not (peer / "cost.json").is_file():
        raise LrqatError(f"{peer}: no cost.json; make it with a script of benchmarks/peers, or leave the row out")
    cost = read_json(peer / "cost.json")
    if missing := [key for key in COST if key not in cost]:
        raise LrqatError(f"{peer / 'cost.json'}: has no {missing[0]}; expected {', '.join(COST)}")
    return cost


def with_cost(row: Row) -> Row:
    """A peer's row with its cost.json as settings."""
    assert row.peer is not None
    return Row(row.name, row.grid, row.command, cost_of(row.peer), None, row.peer)


def check(rows: Sequence[Row], data: Sequence[str]) -> None:
    """Refuse flags that `lrqat` refuses, before anything is run."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "recipe.yaml"
        for row in rows:
            if row.command == "peer":
                continue
            path.write_text(yaml.safe_dump(row.recipe(data)), encoding="utf-8")
            words = with_recipe([row.command, "MODEL", "--config", str(path), "--out", folder])
            said = io.StringIO()
            try:
                with contextlib.redirect_stderr(said):
                    args = make_parser().parse_args(words)
                if row.command == "train":
                    train_settings(args)
                Grid.parse(row.flags["grid"])
            except LrqatError as error:
                raise LrqatError(f"{row.label}: {error}") from None
            except SystemExit:  # argparse
                reason = said.getvalue().strip().rpartition("error: ")[2]
                raise LrqatError(f"{row.label}: lrqat {row.command}: {reason}") from None


def checked(content: Any, allowed: set[str] | None, where: str) -> dict[str, Any]:
    """A mapping with none but the allowed keys."""
    if not isinstance(content, dict) or not all(isinstance(key, str) for key in content):
        raise LrqatError(f"{where}: expected keys and values, got {content!r}")
    if allowed is not None and (unknown := content.keys() - allowed):
        raise LrqatError(f"{where}: unknown key {min(unknown)}; expected some of {', '.join(sorted(allowed))}")
    return content


def listed(content: Any, kind: type, where: str) -> list[Any]:
    """A list of some kind with something in it, or one such value."""
    values = content if isinstance(content, list) else [content]
    if not values or not all(type(value) is kind for value in values):
        raise LrqatError(f"{where}: expected {kind.__name__}, or a list of it, got {content!r}")
    return values
