"""The house: imports go one way, the command lines start without torch, the packages are those that are listed."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import exporters
import lrqat
import serve

HOUSE = Path(__file__).resolve().parent.parent
PACKAGES = ("lrqat", "exporters", "serve")
FILES = sorted(path for package in PACKAGES for path in (HOUSE / package).rglob("*.py"))

# "The CLI modules sit on top and may import all" (DESIGN, section 3).
ON_TOP = {"lrqat.cli", "exporters.cli", "exporters.commands", "serve.parity_cli", "serve.server"}
# What exporters and runtimes know of lrqat: the hand-over and its helpers, nothing of training.
HANDOVER = {
    "lrqat",
    "lrqat.errors",
    "lrqat.grid",
    "lrqat.fused",
    "lrqat.safestream",
    "lrqat.gguf_file",
    "lrqat.jsonfile",
}
HANDOVER |= {"lrqat.grids.wire", "lrqat.grids.affine", "lrqat.grids.kquant", "lrqat.grids.codebook"}
HANDOVER |= {
    "lrqat.jsonfile",
    "lrqat.hashing",
    "lrqat.command",
    "lrqat.models",
    "lrqat.data",
    "lrqat.console",
    "lrqat.client",
    "lrqat.pretokenizers",
}
# Rounding in one go: what tells a re-rounded model from ours, and how kernels round activations.
HANDOVER |= {"lrqat.ptq", "lrqat.ranges", "lrqat.activations", "lrqat.rounding"}
# What was measured about a run: model cards tell it too.
HANDOVER |= {"lrqat.report.facts"}
# grid <- methods <- layers <- train, fused beside the methods: each may import those of a lower number.
FLOORS = {
    "lrqat.errors": 0,
    "lrqat.jsonfile": 1,
    "lrqat.grid": 1,
    "lrqat.grids": 1,
    "lrqat.grids.wire": 1,
    "lrqat.grids.search": 1,
    "lrqat.grids.affine": 2,
    "lrqat.grids.kquant": 2,
    "lrqat.grids.codebook": 2,
    "lrqat.safestream": 1,
    "lrqat.fused": 3,
    "lrqat.ranges": 3,
    "lrqat.methods": 4,
    "lrqat.methods.base": 4,
    "lrqat.methods.lr_qat": 5,
    "lrqat.layers": 6,
    "lrqat.trainer": 7,
    "lrqat.train": 8,
}


def module_of(path: Path) -> str:
    """Dotted name of a file."""
    parts = path.relative_to(HOUSE).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {module_of(path) for path in FILES}


def imports(path: Path) -> Iterator[tuple[str, int]]:
    """Modules of this house that a file imports, anywhere in it, with the line."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}:{node.lineno}: relative import"
            base = node.module or ""
            found = [f"{base}.{a.name}" if f"{base}.{a.name}" in MODULES else base for a in node.names]
        else:
            continue
        yield from ((name, node.lineno) for name in found if name.partition(".")[0] in PACKAGES)


def test_the_reader_of_imports_sees_them(tmp_path: Path) -> None:
    path = tmp_path / "x.py"
    path.write_text("def f():\n    from lrqat import train, __version__\n    import serve.parity, os\n")
    assert list(imports(path)) == [("lrqat.train", 2), ("lrqat", 2), ("serve.parity", 3)]


def allowed(importer: str, imported: str) -> bool:
    """The direction of imports; but `Grid.parse` looks the families up when it is called."""
    if importer == "lrqat.grid" and imported.startswith("lrqat.grids."):
        return True
    if importer in ON_TOP:
        return True
    above, below = importer.partition(".")[0], imported.partition(".")[0]
    if imported in ON_TOP or PACKAGES.index(below) > PACKAGES.index(above):
        return False
    if above != "lrqat" and below == "lrqat":
        return imported in HANDOVER
    if importer in FLOORS and imported in FLOORS and importer != imported:
        return FLOORS[imported] < FLOORS[importer]
    return importer not in ("lrqat.errors", "lrqat.grid", "lrqat.safestream", "lrqat.fused") or imported in FLOORS


@pytest.mark.parametrize("path", FILES, ids=lambda path: module_of(path))
def test_imports_go_one_way(path: Path) -> None:
    importer = module_of(path)
    wrong = [f"{path}:{line}: {importer} imports {name}" for name, line in imports(path) if not allowed(importer, name)]
    assert not wrong, "\n".join(wrong)


def test_the_rule_forbids_what_it_is_for() -> None:
    for importer, imported in [
        ("lrqat.fused", "exporters.gguf"),
        ("lrqat.train", "serve.parity"),
        ("exporters.gguf", "serve.llamacpp"),
        ("exporters.gguf", "lrqat.layers"),
        ("exporters.gptq", "lrqat.methods.lr_qat"),
        ("serve.parity", "lrqat.trainer"),
        ("lrqat.grid", "lrqat.fused"),
        ("lrqat.methods.base", "lrqat.layers"),
        ("lrqat.layers", "lrqat.train"),
        ("lrqat.train", "lrqat.cli"),
    ]:
        assert not allowed(importer, imported)


@pytest.mark.parametrize(
    ("module", "arguments"),
    [
        ("lrqat.cli", [[], ["train"], ["ptq"], ["eval"], ["zeroshot"], ["report"], ["plan"], ["generate"]]),
        ("lrqat.cli", [["export"], ["import"], ["formats"]]),
        ("exporters.cli", [[]]),
        ("serve.parity_cli", [[]]),
        ("serve.server", [[]]),
        ("serve.bench_cli", [[]]),
    ],
)
def test_help_comes_without_torch_and_shows_an_example(module: str, arguments: list[list[str]]) -> None:
    program = f"""
import sys, importlib, io, contextlib
main = importlib.import_module({module!r}).main
for words in {arguments!r}:
    text = io.StringIO()
    try:
        with contextlib.redirect_stdout(text):
            main([*words, "--help"])
    except SystemExit as stop:
        assert stop.code == 0, (words, stop.code)
    assert "usage:" in text.getvalue(), words
    assert not words or "example" in text.getvalue(), words
    heavy = {{"torch", "transformers", "numpy", "safetensors", "gguf"}} & sys.modules.keys()
    assert not heavy, (words, heavy)
"""
    done = subprocess.run([sys.executable, "-c", program], cwd=HOUSE, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr


def test_the_packages_listed_are_the_directories() -> None:
    text = (HOUSE / "pyproject.toml").read_text(encoding="utf-8")  # Python 3.10 has no TOML reader
    listed = ast.literal_eval(text.partition("[tool.setuptools]\npackages = ")[2].partition("\n")[0])
    assert set(listed) == {module_of(path.parent / "__init__.py") for path in FILES}
    assert all((HOUSE / name.replace(".", "/") / "__init__.py").is_file() for name in listed)


def test_every_command_of_the_package_is_there() -> None:
    text = (HOUSE / "pyproject.toml").read_text(encoding="utf-8")
    lines = text.partition("[project.scripts]\n")[2].partition("\n\n")[0].splitlines()
    for module, function in (ast.literal_eval(line.partition("=")[2].strip()).split(":") for line in lines):
        path = HOUSE / f"{module.replace('.', '/')}.py"
        assert path.is_file(), module
        names = [n.name for n in ast.parse(path.read_text()).body if isinstance(n, ast.FunctionDef)]
        assert function in names


def test_the_packages_under_test_are_this_repositorys() -> None:
    for package in (lrqat, exporters, serve):
        assert package.__file__ is not None, f"{package.__name__} is a folder of the tests, not the package"
        assert Path(package.__file__).resolve().is_relative_to(HOUSE)


@pytest.mark.parametrize("path", FILES, ids=lambda path: module_of(path))
def test_every_module_says_what_it_is(path: Path) -> None:
    assert ast.get_docstring(ast.parse(path.read_text(encoding="utf-8")))
