"""What every command shares: recipes, one-line errors, tables, JSON."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from lrqat.errors import LrqatError
from lrqat.memory import keep_freed_memory
from lrqat.ranks import complain, rank


def run(body: Callable[[], int]) -> int:
    """Run a command; what users can mend is one line on stderr and status 2, never a traceback."""
    try:
        return body()
    except LrqatError as error:
        complain(str(error))
        return 2
    except OSError as error:
        where = f"{error.filename}: " if error.filename else ""
        complain(f"{where}{error.strerror or error}")
        return 2
    except RuntimeError as error:
        if type(error).__name__ != "OutOfMemoryError":  # torch's, which is not imported here
            raise
        complain(
            f"{str(error).split('.')[0]}; a smaller --batch-size or --seq-len takes less, and in training "
            "--gradient-checkpointing and --downcast int; `lrqat plan --memory` tells before"
        )
        return 2
    except KeyboardInterrupt:
        if rank() == 0:
            print("interrupted; nothing half-written was left", file=sys.stderr)
        return 130


def with_recipe(argv: Sequence[str]) -> list[str]:
    """`argv` with `--config recipe.yaml` replaced by the recipe's flags, but for those that `argv` has itself.

    A key is a flag's name, with - or _; a list gives several values; true gives a bare flag, false or null none.
    """
    early = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    early.add_argument("--config")
    found, rest = early.parse_known_args(list(argv))
    if found.config is None:
        return rest
    import yaml

    try:
        recipe = yaml.safe_load(Path(found.config).read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise LrqatError(f"{found.config}: not YAML ({' '.join(str(error).split())})") from None
    if not isinstance(recipe, dict):
        raise LrqatError(f"{found.config}: expected flags and values, as in `grid: w4g32`")
    flags: list[str] = []
    for key, value in recipe.items():
        flag = f"--{str(key).replace('_', '-')}"
        if value is None or value is False or any(word == flag or word.startswith(f"{flag}=") for word in rest):
            continue
        flags.append(flag)
        values = value if isinstance(value, list) else [] if value is True else [value]
        flags += [str(v) for v in values]
    leading = next((i for i, word in enumerate(rest) if word.startswith("-")), len(rest))
    return [*rest[:leading], *flags, *rest[leading:]]  # a list's values must not swallow a positional argument


def show(rows: Mapping[str, Any], as_json: bool) -> None:
    """A result on stdout: a table of names and values, or one JSON object."""
    if as_json:
        print(json.dumps(rows))
        return
    width = max(len(key) for key in rows)
    for key, value in rows.items():
        if value is not None:
            print(f"{key:{width}}  {value:.5g}" if isinstance(value, float) else f"{key:{width}}  {value}")


def common_flags(parser: argparse.ArgumentParser) -> None:
    """Flags of every subcommand."""
    parser.add_argument("--config", metavar="YAML", help="a recipe: a YAML file whose keys are these flags")
    parser.add_argument("--json", action="store_true", help="print the result as one JSON object")
    parser.add_argument("--threads", type=int, metavar="N", help="CPU threads (default: one a core)")


def set_threads(threads: int | None) -> None:
    """CPU threads of torch; and the memory that they work in stays (`lrqat.memory`)."""
    keep_freed_memory()
    if threads is not None:
        import torch

        if threads < 1:
            raise LrqatError(f"threads: expected at least 1, got {threads}")
        torch.set_num_threads(threads)
