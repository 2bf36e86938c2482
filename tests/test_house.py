"""The house rules: who may import whom, what stays out of `import mlx_gptoss`, and what --help may cost."""

from __future__ import annotations

import ast
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
LEVEL_0 = {"config", "errors", "sampling", "tokenizer", "machine", "untrusted"}
SEAM = {"backends.base", "backends.rope"}
BACKEND = LEVEL_0 | SEAM | {"weights.tensor", "weights.codecs", "weights.split", "weights.adapters"}
MAY_IMPORT = {  # module prefix -> the prefixes of mlx_gptoss modules that it may import, besides its own package
    # 0: the shared vocabulary
    "errors": set(),
    "machine": set(),
    "config": {"errors"},
    "options.check": {"errors"},
    "options.declare": set(),
    "options.sampling": {"errors", "options.check", "options.declare", "sampling"},
    "sampling": {"errors", "options.check", "options.declare", "options.sampling"},
    "untrusted": {"errors"},
    "tokenizer": {"errors", "untrusted"},
    "nano": set(),
    # 1
    "options": {"errors", "harmony.messages", "sampling"},
    "weights": LEVEL_0,
    "harmony": LEVEL_0,
    "backends": {"errors"},
    "backends.base": LEVEL_0 | {"weights.adapters", "weights.split", "weights.tensor"},
    "backends.rope": {"config"},
    # 2
    "backends.mlx": BACKEND,
    "backends.cuda": BACKEND,
    "engine": {"backends.base", "config", "sampling", "errors", "options.check"},
    "ranks": {"backends.base", "config", "errors", "machine", "sampling"},
    # 3
    "chat": LEVEL_0 | {"options", "engine", "harmony"},
    "calibration": LEVEL_0 | SEAM | {"harmony", "weights"},
    "loading": LEVEL_0 | {"options", "backends", "backends.base", "ranks", "weights"},
    # 4
    "model": LEVEL_0 | {"options", "chat", "engine", "harmony.messages", "loading.memory", "weights.checkpoint"},
    # 5
    "api": LEVEL_0 | {"options", "calibration", "engine", "loading", "model", "ranks", "weights"},
    "tools": LEVEL_0 | {"chat", "harmony.messages", "model"},
    # 6, 7
    "__main__": set(),
    "measure": LEVEL_0
    | {"api", "calibration", "backends", "backends.base", "engine.lookup", "loading", "ranks", "weights"},
    "server": LEVEL_0 | {"chat", "engine", "harmony", "model", "weights.params"},
    "server.models": LEVEL_0
    | {"api", "chat", "engine", "harmony.grammar", "loading", "model", "options", "weights.checkpoint"},
}
ONLY_IN = {  # outside packages -> the only modules that may import them
    "mlx": ("backends.mlx",),
    "llvmlite": tuple(f"backends.mlx.cpu.{name}" for name in ("attention_kernel", "emit", "kernels", "reader")),
    "threadpoolctl": ("backends.mlx.cpu.pool",),
    "torch": ("backends.cuda",),
    "triton": ("backends.cuda",),
    "huggingface_hub": ("loading.hub", "loading.cache"),
    "tokenizers": ("tokenizer",),
    "llguidance": ("harmony.grammar",),
    "matplotlib": ("measure.plot",),
    "fastapi": ("server",),
    "starlette": ("server",),
    "pydantic": ("server",),
    "uvicorn": ("server",),
    "h11": ("server.connection",),
    **dict.fromkeys(("markdown_it", "mdit_py_plugins", "nh3", "pygments", "latex2mathml"), ("server.markdown",)),
    "prometheus_client": ("server.metrics", "server.models.collector"),
    "httpx": ("server.hosted.fetch", "server.hosted.search"),
    "lxml": ("server.hosted.pages",),
    "mcp": ("server.hosted.mcp_servers",),
    "tomllib": ("server.hosted.settings",),
    "tomli": ("server.hosted.settings",),
    "click": (),
    "rich": (),
    "prompt_toolkit": (),
    "platformdirs": (),
    "mlx_lm": (),
    "transformers": (),
    "pickle": (),
}


def modules() -> dict[str, Path]:
    package = ROOT / "mlx_gptoss"
    found = {}
    for path in sorted(package.rglob("*.py")):
        parts = path.relative_to(package).with_suffix("").parts
        found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


def within(name: str, prefix: str) -> bool:
    return name == prefix or name.startswith(prefix + ".")


def imports(name: str, path: Path) -> list[str]:
    """Absolute names of everything that a module imports, relative imports resolved."""
    package = name.split(".") if path.name == "__init__.py" and name else name.split(".")[:-1]
    found = []
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            above = package[: len(package) - node.level + 1] if node.level else []
            base = ".".join([*(["mlx_gptoss"] if node.level else []), *above, *(node.module or "").split(".")]).strip(
                "."
            )
            found += [base, *(f"{base}.{alias.name}" for alias in node.names)] if node.level else [base]
    return found


@pytest.mark.parametrize("name", [name for name in modules() if name])
def test_imports_point_down(name):
    path = modules()[name]
    law = max((prefix for prefix in MAY_IMPORT if within(name, prefix)), key=len, default=None)
    assert law is not None, f"{name} has no place in the house: add it to MAY_IMPORT"
    known = modules()
    for imported in imports(name, path):
        if not within(imported, "mlx_gptoss"):
            for package, homes in ONLY_IN.items():
                assert not within(imported, package) or any(within(name, home) for home in homes), (
                    f"{name} imports {imported}, which only {homes or 'cli'} may"
                )
            continue
        inner = imported.removeprefix("mlx_gptoss").strip(".")
        if inner not in known or not inner:  # a name inside a module, or the package itself
            continue
        own = law if "." not in law or law.startswith("backends") else law.split(".")[0]
        allowed = within(inner, own) or any(within(inner, prefix) for prefix in MAY_IMPORT[law])
        packages = {
            ".".join(prefix.split(".")[:n]) for prefix in MAY_IMPORT[law] for n in range(1, prefix.count(".") + 1)
        }
        assert allowed or inner in packages, f"{name} imports {inner}"


def test_importing_the_package_loads_no_backend():
    code = (
        "import sys, mlx_gptoss; print([m for m in ('mlx.core', 'torch', 'numpy', 'tokenizers') if m in sys.modules])"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert out.stdout.strip() == "[]"


def test_the_api_needs_no_backend():
    code = "import sys, mlx_gptoss; mlx_gptoss.load; print([m for m in ('mlx.core', 'torch') if m in sys.modules])"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert out.stdout.strip() == "[]"


def test_rooms_and_files_are_small():
    """At most ten modules outside the rooms, and every file of the program can be read in one sitting."""
    assert len(list((ROOT / "mlx_gptoss").glob("*.py"))) <= 10
    files = [path for folder in ("mlx_gptoss", "cli") for path in (ROOT / folder).rglob("*.py")]
    long = {str(path.relative_to(ROOT)): lines for path in files if (lines := len(path.read_text().splitlines())) > 400}
    assert not long


def test_only_known_things_at_the_top():
    tracked = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True)
    if tracked.returncode:
        pytest.skip("not a git checkout")
    top = {line.split("/")[0] for line in tracked.stdout.splitlines() if not line.startswith(".")}
    assert top <= {"pyproject.toml", "README.md", "LICENSE", "mlx_gptoss", "cli", "tests", "examples"}


@pytest.mark.parametrize("tool", [["ruff", "check", "."], ["ruff", "format", "--check", "."], ["mypy"]], ids=" ".join)
def test_linters_are_content(tool):
    out = subprocess.run([sys.executable, "-m", *tool], cwd=ROOT, capture_output=True, text=True)
    assert out.returncode == 0, out.stdout + out.stderr


def test_quick_tests_cover_every_folder():
    """Every entry of QUICK selects something, and every folder of tests has one."""
    conftest = ast.parse((ROOT / "tests/conftest.py").read_text())
    (entries,) = (
        ast.literal_eval(node.value)
        for node in conftest.body
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "QUICK"
    )
    words = [sys.executable, "-m", "pytest", "--collect-only", "-m", "quick", "-p", "no:xdist"]
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")}
    out = subprocess.run(words, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert out.returncode == 0, out.stdout[-2000:] + out.stderr[-2000:]
    ids = [line for line in out.stdout.splitlines() if line.startswith("tests/")]
    assert not [entry for entry in entries if not any(id.startswith(entry) for id in ids)]
    files = {id.split(":")[0] for id in ids}
    folders = {
        path.parent.relative_to(ROOT).parts[1]
        for path in (ROOT / "tests").rglob("test_*.py")
        if path.parent != ROOT / "tests"
    }
    assert folders == {Path(file).parts[1] for file in files if len(Path(file).parts) > 2}
