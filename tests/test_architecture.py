"""Imports go one way, heavy libraries have one address each, and `import sdvae` is cheap."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

import sdvae

PACKAGE = Path(sdvae.__file__).parent
TESTS = Path(__file__).parent
MOST_FILES = 16  # in a folder, with __init__.py; one for each command in cli

# Packages of one level do not import each other.
LEVELS = [
    {"_version", "_torchvision", "errors"},
    {"config", "files", "processes"},
    {"model", "features", "data", "report"},
    {"checkpoints", "metrics"},
    {"latents"},
    {"codec", "calibration", "precision"},
    {"evaluation", "training"},
    {"card"},
    {"cli"},
]
LEVEL_OF = {name: level for level, names in enumerate(LEVELS) for name in names}

ADDRESSES = {
    "diffusers": {
        "model/autoencoder.py",
        "checkpoints/store.py",
        "checkpoints/any_autoencoder.py",
        "model/optimize.py",
    },
    "accelerate": {"training/loop.py", "training/state.py"},
    "datasets": {"data/sources/datasets.py"},
    "webdataset": {"data/sources/shards.py"},
    "ray": {"codec/ray.py"},
}


def imports(source: str, package: str) -> set[str]:
    """Full names of the modules that a source file imports, at any depth of its functions."""
    found = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = ".".join(package.split(".")[: len(package.split(".")) - node.level + 1]) if node.level else ""
            found.add(".".join(part for part in (base, node.module) if part))
            if node.module == "sdvae":
                found |= {f"sdvae.{alias.name}" for alias in node.names}
    return found


def files() -> list[Path]:
    return sorted(path for path in PACKAGE.rglob("*.py") if path.parent != PACKAGE or path.stem in LEVEL_OF)


def violations(source: str, part: str) -> list[str]:
    targets = {name.split(".")[1] for name in imports(source, f"sdvae.{part}") if name.startswith("sdvae.")}
    return sorted(name for name in targets - {part} if LEVEL_OF[name] >= LEVEL_OF[part] and part not in LEVELS[0])


@pytest.mark.parametrize("path", files(), ids=lambda path: path.relative_to(PACKAGE).as_posix())
def test_a_file_imports_only_from_levels_below_its_own(path: Path) -> None:
    part = path.relative_to(PACKAGE).parts[0].removesuffix(".py")
    assert violations(path.read_text(encoding="utf-8"), part) == []


def module_name(path: Path) -> str:
    parts = ("sdvae", *path.relative_to(PACKAGE).with_suffix("").parts)
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def cycle_in(graph: dict[str, set[str]]) -> list[str]:
    """One of the cycles, as the names on it; empty if there is none."""
    done: set[str] = set()

    def visit(name: str, way: list[str]) -> list[str]:
        if name in way:
            return way[way.index(name) :]
        if name in done:
            return []
        for target in sorted(graph[name]):
            if cycle := visit(target, [*way, name]):
                return cycle
        done.add(name)
        return []

    return next((cycle for name in sorted(graph) if (cycle := visit(name, []))), [])


def test_no_modules_import_each_other_in_a_circle() -> None:
    """Imports within functions included; those for type checkers alone are not run."""
    modules = {module_name(path): path for path in PACKAGE.rglob("*.py") if path != PACKAGE / "__init__.py"}
    graph = {}
    for name, path in modules.items():
        tree = ast.parse(path.read_text(encoding="utf-8"))
        for node in ast.walk(tree):
            if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING":
                node.body = [ast.Pass()]
        package = name if path.stem == "__init__" else name.rpartition(".")[0]
        graph[name] = imports(ast.unparse(tree), package) & modules.keys()
    assert cycle_in(graph) == []
    assert cycle_in({"a": {"b"}, "b": {"c"}, "c": {"b"}}) == ["b", "c"]


def test_a_folder_has_few_files_and_its_tests_mirror_it() -> None:
    folders = [path for path in PACKAGE.rglob("*") if path.is_dir() and any(path.glob("*.py"))]
    counts = {str(folder.relative_to(PACKAGE)): len(list(folder.glob("*.py"))) for folder in folders}
    assert {name: count for name, count in counts.items() if count > MOST_FILES and name != "cli"} == {}
    without = {name for name in counts if name != "assets" and not any((TESTS / name).rglob("test_*.py"))}
    assert without == set(), "a folder of the package without tests of its own"


def test_the_check_sees_a_wrong_import() -> None:
    assert violations("from sdvae.training.loop import train", "codec") == ["training"]
    assert violations("import sdvae.evaluation.runner", "codec") == ["evaluation"]
    assert violations("def f():\n    from sdvae import cli", "training") == ["cli"]


@pytest.mark.parametrize("library", ADDRESSES)
def test_a_heavy_library_is_imported_only_at_its_address(library: str) -> None:
    users = {
        path.relative_to(PACKAGE).as_posix()
        for path in PACKAGE.rglob("*.py")
        if any(name.split(".")[0] == library for name in imports(path.read_text(encoding="utf-8"), "sdvae"))
    }
    assert users <= ADDRESSES[library]


def test_diffusers_is_imported_only_after_the_repair_of_torchvision() -> None:
    """Its first import may be any of them, and fails beside a torchvision that does not fit torch."""
    for name in ADDRESSES["diffusers"]:
        source = (PACKAGE / name).read_text(encoding="utf-8")
        repair = [at.start() for at in re.finditer(r"^ *ensure_torchvision_importable\(\)$", source, re.MULTILINE)]
        first = [at.start() for at in re.finditer(r"^ *(from|import) diffusers\b", source, re.MULTILINE)]
        typing = [at for at in first if source[:at].rstrip().endswith("if TYPE_CHECKING:")]
        assert repair and repair[0] < min(set(first) - set(typing)), name


def test_an_unknown_public_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="no attribute 'nonsense'"):
        sdvae.nonsense  # noqa: B018
