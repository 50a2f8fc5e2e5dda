"""The choice of the Python interpreter, and the completeness of its constraints file."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).parents[2]
VERSIONS = ("3.11", "3.12")


def program(path: Path, text: str) -> str:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"#!/bin/sh\n{text}\n")
    path.chmod(0o755)
    return str(path)


def found(folder: Path, *candidates: str) -> subprocess.CompletedProcess[str]:
    """Run find_python.sh with ``folder/bin`` first in PATH and pyenv's versions in ``folder/pyenv``."""
    environment = {"PATH": f"{folder / 'bin'}:/usr/bin:/bin", "PYENV_ROOT": str(folder / "pyenv"), "HOME": str(folder)}
    script = ["bash", str(ROOT / "scripts" / "find_python.sh"), *candidates]
    return subprocess.run(script, env=environment, text=True, capture_output=True, check=False)


def test_python_3_12_is_preferred(tmp_path: Path) -> None:
    program(tmp_path / "bin" / "python3.11", 'echo "$0"')
    newer = program(tmp_path / "bin" / "python3.12", 'echo "$0"')
    assert found(tmp_path).stdout.strip() == newer


def test_a_shim_that_fails_gives_way_to_the_version_behind_it(tmp_path: Path) -> None:
    program(tmp_path / "bin" / "python3.12", "echo pyenv: python3.12: command not found >&2; exit 127")
    other = program(tmp_path / "bin" / "python3.11", 'echo "$0"')
    assert found(tmp_path, "python3.12", "python3.11").stdout.strip() == other
    program(tmp_path / "pyenv" / "versions" / "3.12.9" / "bin" / "python3.12", 'echo "$0"')
    newest = program(tmp_path / "pyenv" / "versions" / "3.12.10" / "bin" / "python3.12", 'echo "$0"')
    for candidates in ((), ("python3.12",)):
        assert found(tmp_path, *candidates).stdout.strip() == newest
    assert found(tmp_path, "python3.11").stdout.strip() == other


def test_a_name_that_is_asked_for_and_not_there_is_an_error_with_a_remedy(tmp_path: Path) -> None:
    program(tmp_path / "bin" / "python3.12", "exit 1")
    for candidates in (("python3.12",), (str(tmp_path / "nowhere" / "python"),)):
        done = found(tmp_path, *candidates)
        assert done.returncode == 2 and not done.stdout
        assert candidates[0] in done.stderr and "make PYTHON=" in done.stderr


def pins(version: str) -> dict[str, str]:
    """Return name → version of a constraints file, which has only exact pins."""
    lines = (ROOT / f"constraints-{version}.txt").read_text().splitlines()
    matched = [re.fullmatch(r"([A-Za-z0-9._-]+)==([^+\s]+)", line) for line in lines if not line.startswith("#")]
    assert all(matched), "an exact version a line, without a local suffix: pip would insist on that build"
    return {canonicalize_name(match[1]): match[2] for match in matched if match}


def required() -> list[Requirement]:
    """Return the requirements in setup.py that make installs."""
    said: dict[str, Any] = {}
    source = (ROOT / "setup.py").read_text()
    with mock.patch("setuptools.setup", said.update):
        exec(compile(source, str(ROOT / "setup.py"), "exec"), {"__file__": str(ROOT / "setup.py")})
    extras = said["extras_require"]
    return [Requirement(text) for text in (*said["install_requires"], *extras["dev"], *extras["docs"])]


@pytest.mark.parametrize("version", VERSIONS)
def test_the_constraints_pin_what_is_required(version: str) -> None:
    pinned = pins(version)
    for requirement in required():
        if requirement.marker and not requirement.marker.evaluate({"python_version": version}):
            continue
        assert requirement.specifier.contains(pinned[canonicalize_name(requirement.name)]), requirement


def test_each_python_has_its_megatron_core() -> None:
    assert pins("3.11")["megatron-core"] == "0.16.1" and pins("3.12")["megatron-core"].startswith("0.19.")
    assert pins("3.11")["torch"] == pins("3.12")["torch"]


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """Make a folder with the Makefile, its scripts, and stand-ins for the interpreters that record their arguments."""
    for name in ("Makefile", "setup.py", "pyproject.toml", "scripts/find_python.sh", "scripts/install.sh"):
        copy = tmp_path / name
        copy.parent.mkdir(exist_ok=True)
        copy.write_bytes((ROOT / name).read_bytes())
    (tmp_path / "bin").mkdir()
    for version in VERSIONS:
        (tmp_path / f"constraints-{version}.txt").write_text(f"torch==2.{version.replace('.', '')}\n")
        make = f'mkdir -p "$place/bin"; cp "$0" "$place/bin/python"; echo "version = {version}.4" > "$place/pyvenv.cfg"'
        program(
            tmp_path / "bin" / f"python{version}",
            f'echo "$0 $*" >> {tmp_path / "asked.txt"}\ncase "$*" in *ensurepip*) echo "$0" ;; *version_info*) '
            f"echo {version} ;; *venv*) for place; do :; done; {make} ;; esac",
        )
    return tmp_path


def installed(checkout: Path, *arguments: str) -> tuple[str, str]:
    """Run ``make install``; return its output, and the arguments that the interpreters got."""
    (checkout / "asked.txt").write_text("")
    environment = {**os.environ, "PATH": f"{checkout / 'bin'}:/usr/bin:/bin", "PYENV_ROOT": str(checkout / "pyenv")}
    environment = {k: v for k, v in environment.items() if k not in ("PYTHON", "VENV", "MAKEFLAGS", "MAKELEVEL")}
    done = subprocess.run(
        ["make", "install", *arguments], cwd=checkout, env=environment, text=True, capture_output=True, check=True
    )
    return done.stdout, (checkout / "asked.txt").read_text()


def test_make_chooses_the_constraints_by_the_interpreter(checkout: Path) -> None:
    said, asked = installed(checkout)
    assert "constraints-3.12.txt" in said and "-c constraints-3.12.txt torch==2.312 " in asked
    said, asked = installed(checkout)
    assert not said and not asked, "all is there already"
    said, asked = installed(checkout, "PYTHON=python3.11", "VENV=.venv311")
    assert "-c constraints-3.11.txt torch==2.311 " in asked and "constraints-3.12" not in asked
    assert not installed(checkout, "PYTHON=python3.11", "VENV=.venv311")[0]
    assert not installed(checkout, "PYTHON=python3.12")[0], "the first environment is still there"


def test_an_environment_of_another_python_is_made_anew_when_that_is_asked_for(checkout: Path) -> None:
    installed(checkout, "PYTHON=python3.11")
    said, asked = installed(checkout)
    assert not said and not asked, "without PYTHON, the environment that is there is taken as it is"
    said, asked = installed(checkout, "PYTHON=python3.12")
    assert ".venv has Python 3.11, PYTHON=python3.12 is 3.12" in said and "-c constraints-3.12.txt" in asked


def test_the_hooks_run_programs_of_the_environment() -> None:
    hooks = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text())["repos"][0]["hooks"]
    for hook in hooks:
        folder, name = hook["entry"].split()[0].rsplit("/", 1)
        assert folder == ".venv/bin" and (Path(sys.executable).parent / name).exists(), hook["id"]


def test_files_that_other_programs_read_name_what_is_here() -> None:
    container = ("launch/container/Dockerfile", "launch/container/steerlm.def")
    for name in (*container, "README.md", "CONTRIBUTING.md", "docs/design.md", ".devcontainer/devcontainer.json"):
        named = set(re.findall(r"constraints[\w.-]*\.txt", (ROOT / name).read_text()))
        assert named and named <= {path.name for path in ROOT.glob("constraints-*.txt")}, (name, named)
    workflow = yaml.safe_load((ROOT / ".github" / "workflows" / "ci.yml").read_text())
    steps = workflow["jobs"]["test"]["steps"]
    assert steps[-1]["run"] == "bash .ci/run" and (ROOT / ".ci" / "run").exists()
    version = re.search(r'^__version__ = "(.+)"', (ROOT / "steerlm_megatron" / "__init__.py").read_text(), re.M)
    cited = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert version and cited["version"] == version[1] and version[1] in (ROOT / "CHANGELOG.md").read_text()
