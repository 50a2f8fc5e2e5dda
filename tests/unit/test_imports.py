"""Imports follow the layers of docs/design.md, and each heavy library is imported in few files only."""

from __future__ import annotations

import ast
import subprocess
import sys
import textwrap
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PACKAGE = "steerlm_megatron"

# A part may import parts of a lower level, and of its own level as long as these do not import it back.
LEVELS = {
    "__init__": 0, "errors": 0, "files": 0, "steer": 0, "config": 0,
    "runtime": 1, "observe": 1,
    "data": 2, "model": 2,
    "train": 3, "generate": 3, "serve": 3, "report": 3, "plan": 3,
    "evaluate": 4,
    "stages": 5,
    "launch": 6,
    "cli": 7,
    "__main__": 8,
}  # fmt: skip
NEVER = {("train", "generate"), ("generate", "train"), ("train", "serve"), ("serve", "train")}

# Library -> files (or folders, with a slash at the end) of the package that may import it.
PLACES = {
    "hydra": ("config/compose.py",),
    "deepspeed": ("train/engine_deepspeed.py",),
    "megatron": (
        "runtime/parallel.py", "runtime/mcore_private.py", "runtime/collectives.py", "model/", "train/engine_mcore.py",
        "train/sharded.py", "train/ranges.py", "train/schedule.py", "train/rng.py", "train/engine_deepspeed.py",
        "generate/",
    ),
    "data_tools": ("stages/", "evaluate/"),
    "huggingface_hub": ("stages/hub.py",),
    "matplotlib": ("report/",),
    "jinja2": ("report/", "steer/jinja_sandbox.py", "evaluate/judge_prompts.py"),  # pages, chat templates, prompts
    "sacrebleu": ("observe/diversity.py",),
    **dict.fromkeys(("fastapi", "starlette", "uvicorn", "httpx", "h11", "prometheus_client"), ("serve/",)),
}  # fmt: skip
# Libraries that the domain imports where they are needed: to read compressed records, and a model's own chat template.
LAZY = {("zstandard", "steer/records.py"), ("jinja2", "steer/jinja_sandbox.py")}


@dataclass(frozen=True)
class Import:
    """An import of ``module`` (absolute, dotted) in line ``line``; ``lazy`` if it is inside a function."""

    module: str
    line: int
    lazy: bool


def imports_of(source: str, package: str) -> Iterator[Import]:
    """Yield all imports of a file, wherever in it; ``package`` (dotted) is what relative ones start from."""

    def visit(node: ast.AST, lazy: bool) -> Iterator[Import]:
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield Import(alias.name, node.lineno, lazy)
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                kept = package.split(".")[: len(package.split(".")) - node.level + 1]
                base = ".".join([*kept, base] if base else kept)
            if base == PACKAGE:  # in "from steerlm_megatron import cli" the names are modules
                for alias in node.names:
                    yield Import(f"{base}.{alias.name}", node.lineno, lazy)
            else:
                yield Import(base, node.lineno, lazy)
        inside = lazy or isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
        for child in ast.iter_child_nodes(node):
            yield from visit(child, inside)

    yield from visit(ast.parse(source), False)


def part_of(relative: str) -> str:
    """Return the first part of a path: ``steer/records.py`` -> steer; ``cli.py`` -> cli."""
    return relative.split("/")[0].removesuffix(".py")


def problems(root: Path) -> list[str]:
    """Return every wrong import under ``root``, which holds the folders steerlm_megatron and data_tools."""
    found: list[str] = []
    edges: dict[tuple[str, str], str] = {}
    for path in sorted((root / PACKAGE).rglob("*.py")):
        relative = path.relative_to(root / PACKAGE).as_posix()
        package = ".".join((PACKAGE, *Path(relative).parts[:-1]))
        part = part_of(relative)
        if part not in LEVELS:
            found.append(f"{relative}: '{part}' has no level; give it one in tests/unit/test_imports.py")
            continue
        try:
            items = list(imports_of(path.read_text(encoding="utf-8"), package))
        except SyntaxError as error:
            found.append(f"{relative}:{error.lineno}: {error.msg}")
            continue
        for item in items:
            where = f"{relative}:{item.line}"
            top, *rest = item.module.split(".")
            if top == PACKAGE:
                target = rest[0] if rest and rest[0] in LEVELS else "__init__"
                if target == part or target == "__init__":
                    continue
                edges.setdefault((part, target), where)
                if LEVELS[target] > LEVELS[part] or (part, target) in NEVER:
                    found.append(f"{where}: {part} imports {target}")
            else:
                found += library_problems(relative, where, top, item)
    for (part, target), where in edges.items():
        if LEVELS[part] == LEVELS[target] and part < target and (target, part) in edges:
            found.append(f"{where} and {edges[target, part]}: {part} and {target} import each other")
    return found + data_tools_problems(root)


def library_problems(relative: str, where: str, top: str, item: Import) -> list[str]:
    """Return what is wrong with importing the library ``top`` in the file ``relative``."""
    places = PLACES.get(top)
    if places is not None and not any(
        relative.startswith(place) if place.endswith("/") else relative == place for place in places
    ):
        return [f"{where}: {top} is imported only in {', '.join(places)}"]
    if part_of(relative) in ("steer", "errors", "files", "__init__") and top not in sys.stdlib_module_names:
        if not (item.lazy and (top, relative) in LAZY):
            return [f"{where}: {part_of(relative)} is standard library only, not {top}"]
    return []


def data_tools_problems(root: Path) -> list[str]:
    """Return wrong imports of data_tools, which may use steer, files, errors (inspect: data too), no heavy library."""
    found = []
    for path in sorted((root / "data_tools").rglob("*.py")):
        relative = path.relative_to(root).as_posix()
        for item in imports_of(path.read_text(encoding="utf-8"), ".".join(Path(relative).parts[:-1])):
            top, *rest = item.module.split(".")
            allowed = {"steer", "files", "errors"} | ({"data"} if relative == "data_tools/inspect.py" else set())
            if top == PACKAGE and (rest[:1] or ["?"])[0] not in allowed:
                found.append(f"{relative}:{item.line}: data_tools imports {item.module}")
            if top in ("hydra", "deepspeed", "megatron"):
                found.append(f"{relative}:{item.line}: data_tools imports {top}")
    return found


def test_every_part_and_place_is_there() -> None:
    folder = ROOT / PACKAGE
    assert {part for part in LEVELS if not (folder / part).is_dir() and not (folder / f"{part}.py").is_file()} == set()
    for library, places in PLACES.items():
        for place in places:
            paths = (folder / place).rglob("*.py") if place.endswith("/") else [folder / place]
            imports = [item.module for path in paths for item in imports_of(path.read_text("utf-8"), PACKAGE)]
            assert library in {module.split(".")[0] for module in imports}, f"{place} does not import {library}"


def test_imports_point_left() -> None:
    assert (ROOT / PACKAGE / "errors.py").is_file()
    assert problems(ROOT) == []


PLANTED = {
    "steer/a.py": ("import numpy", "standard library only"),
    "files.py": ("import numpy", "standard library only"),
    "report/a.py": ("from steerlm_megatron.stages import evaluate", "report imports stages"),
    "steer/b.py": ("from steerlm_megatron.data import shards", "steer imports data"),
    "steer/records.py": ("import zstandard", "standard library only"),
    "runtime/a.py": ("from ..model.gpt import build", "runtime imports model"),
    "observe/a.py": ("from steerlm_megatron import stages", "observe imports stages"),
    "train/a.py": ("def f():\n    import steerlm_megatron.generate.generator", "train imports generate"),
    "generate/a.py": ("from steerlm_megatron.train.loop import run", "generate imports train"),
    "stages/a.py": ("import hydra", "hydra is imported only in config/compose.py"),
    "stages/c.py": ("import jinja2", "jinja2 is imported only in report/"),
    "train/loop.py": ("from megatron.core import parallel_state", "megatron is imported only in"),
    "train/engine_mcore.py": ("import deepspeed", "deepspeed is imported only in"),
    "data/a.py": ("from data_tools import oasst", "data_tools is imported only in stages/"),
    "cli_tools.py": ("import os", "has no level"),
    "stages/b.py": ("def f(:", "invalid syntax"),
    "../data_tools/a.py": ("from steerlm_megatron.data.shards import ShardDataset", "data_tools imports"),
}


@pytest.mark.parametrize("relative", PLANTED)
def test_planted_wrong_edge_is_found(tmp_path: Path, relative: str) -> None:
    line, message = PLANTED[relative]
    path = (tmp_path / PACKAGE / relative).resolve()
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(line + "\n", encoding="utf-8")
    found = problems(tmp_path)
    assert len(found) == 1 and message in found[0], found


def test_planted_cycle_is_found_and_right_edges_pass(tmp_path: Path) -> None:
    files = {
        "errors.py": "import os",
        "steer/records.py": "from steerlm_megatron.errors import UserError\ndef f():\n    import zstandard",
        "runtime/parallel.py": "import megatron.core\nfrom steerlm_megatron.observe import log",
        "stages/a.py": "from steerlm_megatron.train import loop\nimport steerlm_megatron.generate.x\nimport data_tools",
        "config/compose.py": "import hydra",
        "cli.py": "from . import stages",
    }
    for relative, text in files.items():
        path = tmp_path / PACKAGE / relative
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
    assert problems(tmp_path) == []
    (tmp_path / PACKAGE / "observe").mkdir()
    (tmp_path / PACKAGE / "observe" / "log.py").write_text("import steerlm_megatron.runtime.device", encoding="utf-8")
    assert len(problems(tmp_path)) == 1 and "import each other" in problems(tmp_path)[0]


def test_importing_the_package_is_fast_and_light() -> None:
    code = """
        import sys, time
        start = time.process_time()
        import steerlm_megatron, steerlm_megatron.errors, steerlm_megatron.config.schema
        seconds = time.process_time() - start
        heavy = sorted({"torch", "megatron", "deepspeed", "hydra", "transformers", "numpy"} & set(sys.modules))
        print(seconds, *heavy)
    """
    result = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)], cwd=ROOT, capture_output=True, text=True, timeout=300, check=True
    )
    seconds, *heavy = result.stdout.split()
    assert heavy == []
    assert float(seconds) < 0.5
