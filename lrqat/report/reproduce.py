"""The commands that make a run again, with every setting spelled out: defaults may change, commands stay."""

from __future__ import annotations

import shlex
from typing import Any

from lrqat.report.facts import Certificate, Facts

LINE = 76
CONTINUED = " \\\n  "
DEFAULT_TEXT = ["CPython documentation"]


def train_command(settings: dict[str, Any], out: str) -> str:
    """`lrqat train` with the settings of run.json; they are flags of the same name."""
    words = ["lrqat train", shlex.quote(str(settings["model"]))]
    for name, value in settings.items():
        flag = f"--{name.replace('_', '-')}"
        if name == "model" or value is False or value == []:
            continue
        if value is None:
            if name == "range_p":
                words.append(f"{flag} 0")
        elif value is True:
            words.append(flag)
        else:
            values = value if isinstance(value, list | tuple) else [value]
            quoted = [shlex.quote(str(v)) for v in values]
            apart = CONTINUED + "  " if len(" ".join(quoted)) > LINE else " "
            words.append(apart.join([flag, *quoted]))
    return _wrapped([*words, f"--out {shlex.quote(out)}"])


def export_command(facts: Facts, certificate: Certificate) -> str | None:
    """`lrqat-export` of a certified model; None where its format is not known."""
    if certificate.export_flags is None:
        return None
    return _wrapped(
        ["lrqat-export", shlex.quote(str(facts.run)), certificate.export_flags, f"--out {_quoted(certificate)}"]
    )


def parity_command(facts: Facts, certificate: Certificate) -> str:
    """`lrqat-parity` as the certificate's settings say."""
    settings = certificate.content["settings"]
    words = ["lrqat-parity", shlex.quote(str(facts.run)), _quoted(certificate)]
    words += [f"--sequences {settings['sequences']}", f"--seq-len {settings['tokens']}"]
    if (texts := settings.get("texts")) and texts != DEFAULT_TEXT:
        words.append(f"--text {shlex.join(map(str, texts))}")
    if "vllm" in certificate.content["runtime"].lower():
        words.append("--python .venv-vllm/bin/python")
    return _wrapped(words)


def bench_command(bench: dict[str, Any]) -> str:
    """`lrqat-bench` of the same models and settings."""
    settings = bench["settings"]
    paths = [model["path"] for label, model in bench["models"].items() if label != bench["noise"]]
    flags = {
        "--prompt-tokens": "prompt_tokens",
        "--tokens": "generated_tokens",
        "--rounds": "rounds",
        "--sittings": "sittings",
        "--threads": "threads",
        "--seed": "seed",
        "--python": "python",
        "--dtype": "dtype",
    }
    words = ["lrqat-bench", shlex.join(map(str, paths))]
    given = {flag: settings[key] for flag, key in flags.items() if settings.get(key) is not None}
    words += [f"{flag} {shlex.quote(str(value))}" for flag, value in given.items()]
    return _wrapped(words)


def commands(facts: Facts) -> list[str]:
    """All of them, in order."""
    found = [train_command(facts.settings, str(facts.run))]
    for certificate in facts.certificates:
        found += [c for c in (export_command(facts, certificate), parity_command(facts, certificate)) if c]
    return found + [bench_command(bench) for bench in facts.benches]


def _quoted(certificate: Certificate) -> str:
    return shlex.quote(str(certificate.exported))


def _wrapped(words: list[str]) -> str:
    """One flag a line where it is long; a shell takes it as it is."""
    line = " ".join(words)
    return line if len(line) <= LINE else CONTINUED.join(words)
