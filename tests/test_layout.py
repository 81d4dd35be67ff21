"""The architecture, as CONTRIBUTING.md has it: imports point down, pure modules stay pure."""

import ast
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parent.parent / "saev_dist"
LEVELS = [
    {"cli", "__main__"},
    {"demo", "merge"},
    {"extract", "replay", "verify", "inspect", "convert"},
    {
        "job",
        "statistics",
        "replay_job",
        "artifacts",
        "finished",
        "reencode",
        "records",
        "draw",
        "world",
        "grid",
        "store",
        "visuals",
        "lock",
        "partials",
        "sae",
        "data",
        "spill",
        "csr",
        "files",
        "machine",
        "signals",
        "estimate",
        "selfcheck",
        "progress",
        "report",
        "replay_report",
        "pages",
    },
    {"accumulators", "plan", "choose", "render", "fields", "identity"},
    {"config", "errors", "output", "fused", "kernels"},
]
IMPURE = {"os", "sys", "logging", "pathlib", "io", "shutil", "tempfile", "time", "subprocess", "torch.distributed"}
FILES = sorted(PACKAGE.rglob("*.py"))
PURE = {"accumulators", "plan", "choose", "render", "identity"}


def imports(fpath: Path) -> set[str]:
    """Dotted names of everything that a file imports, at any depth."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(fpath.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            names |= {f"{node.module}.{alias.name}" for alias in node.names} | {str(node.module)}
    return names


def name_of(fpath: Path) -> str:
    return str(fpath.relative_to(PACKAGE))


def area_of(fpath: Path) -> str:
    return fpath.relative_to(PACKAGE).parts[0].removesuffix(".py")


def level(area: str) -> int:
    return next(i for i, areas in enumerate(LEVELS) if area in areas)


@pytest.mark.parametrize("fpath", FILES, ids=name_of)
def test_imports_point_down(fpath):
    area = area_of(fpath)
    if area == "__init__":
        assert not imports(fpath)
        return
    targets = {name.split(".")[1] for name in imports(fpath) if name.startswith("saev_dist.")} - {"__version__", area}
    assert all(level(target) >= level(area) for target in targets), targets


@pytest.mark.parametrize("fpath", [fpath for fpath in FILES if area_of(fpath) in PURE], ids=name_of)
def test_pure_modules_touch_nothing_outside(fpath):
    # BytesIO is a file in memory: libraries write pictures to it, and nothing leaves the process.
    used = imports(fpath) - ({"io"} if "io.BytesIO" in imports(fpath) else set())
    assert not used & IMPURE
    called = {node.func.id for node in ast.walk(ast.parse(fpath.read_text())) if isinstance(node, ast.Call) and isinstance(node.func, ast.Name)}  # fmt: skip
    assert not called & {"open", "print", "input"}
    assert (ast.get_docstring(ast.parse(fpath.read_text())) or "").startswith("PURE") or fpath.name == "__init__.py"


LAUNCHER = PACKAGE.parent / "slurm"
LAUNCHER_LEVELS = [{"launch"}, {"submit", "watch"}, {"task", "sweep", "queue", "progress"}, {"jobs", "config", "hold"}]


@pytest.mark.parametrize("fpath", sorted(LAUNCHER.glob("*.py")), ids=lambda fpath: fpath.name)
def test_the_launcher_stands_above_the_package(fpath):
    def launcher_level(name: str) -> int:
        return next(i for i, names in enumerate(LAUNCHER_LEVELS) if name in names)

    used = imports(fpath)
    targets = {name.split(".")[1] for name in used if name.startswith("slurm.")}
    assert fpath.stem == "__init__" or all(launcher_level(target) > launcher_level(fpath.stem) for target in targets), targets
    assert fpath.stem in ("submit", "task") or not any(name.startswith("submitit") for name in used)


def test_the_package_knows_no_launcher():
    assert not [name for fpath in FILES for name in imports(fpath) if name.startswith(("slurm", "submitit"))]
