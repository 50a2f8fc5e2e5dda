"""Names that Megatron-Core does not promise to keep: the installed version has them, and they stand in one file."""

from __future__ import annotations

import ast
import functools
import re
from collections.abc import Iterator
from pathlib import Path

import megatron.core
import pytest

from steerlm_megatron.runtime import mcore_private
from steerlm_megatron.runtime.mcore_private import NAMES, Name

PACKAGE = Path(mcore_private.__file__).parents[1]
HOME = "runtime/mcore_private.py"


@pytest.mark.parametrize("name", NAMES, ids=str)
def test_the_installed_megatron_core_has_the_name(name: Name) -> None:
    name.check()


MOVED = {
    "no_module": (
        Name("no.such", ("a",), "it is tested"),
        "megatron.core.no.such: a has moved: there is no such module",
    ),
    "no_name": (Name("utils", ("old", "Old.new"), "it is tested"), "megatron.core.utils: old or Old.new has moved"),
    "no_parameter": (
        Name("utils", ("local_multi_tensor_l2_norm",), "it is tested", ("chunk_size", "color", "taste")),
        "it takes no color and no taste",
    ),
}


@pytest.mark.parametrize("name, message", MOVED.values(), ids=MOVED)
def test_a_name_that_moved_is_named_with_the_version_and_the_reason(name: Name, message: str) -> None:
    with pytest.raises(AttributeError, match=re.escape(message)) as raised:
        name.check()
    assert str(raised.value).endswith(f"in Megatron-Core {megatron.core.__version__}; it is tested")


def test_a_name_is_found_under_any_of_its_spellings() -> None:
    assert Name("utils", ("local_old", "local_multi_tensor_l2_norm"), "").path == "local_multi_tensor_l2_norm"


@functools.cache
def private_names_of_megatron() -> frozenset[str]:
    """Every name with one leading underscore that Megatron-Core defines, be it a function, a variable or a member."""
    defined = re.compile(
        r"^\s*(?:async )?(?:def|class) (_[A-Za-z]\w*)|(?:^|self\.|cls\.)(_[A-Za-z]\w*)\s*(?:=|:)", re.M
    )
    found: set[str] = set()
    for path in Path(megatron.core.__file__).parent.rglob("*.py"):
        found.update(name for match in defined.findall(path.read_text(encoding="utf-8")) for name in match if name)
    return frozenset(found)


def uses(source: str) -> Iterator[tuple[int, str]]:
    """(line, what) of each use of a private name of Megatron-Core, and of each patch of what is imported from it.

    An attribute counts if Megatron-Core defines one of its name, in a file that imports Megatron-Core; one of ``self``
    counts where the class may have inherited it, which is where a base is imported from there.
    """
    tree = ast.parse(source)
    imported = {
        (alias.asname or alias.name).split(".")[0]
        for node in ast.walk(tree)
        for alias in getattr(node, "names", ())
        if isinstance(node, ast.Import)
        and alias.name.split(".")[0] == "megatron"
        or isinstance(node, ast.ImportFrom)
        and (node.module or "").split(".")[0] == "megatron"
    }
    hooked = imported | {name for name in vars(mcore_private) if name.startswith("Hooked") and name in source}
    if not hooked:
        return
    private = private_names_of_megatron()

    def root(node: ast.AST) -> str:
        while isinstance(node, ast.Attribute):
            node = node.value
        return node.id if isinstance(node, ast.Name) else ""

    def visit(node: ast.AST, inherits: bool) -> Iterator[tuple[int, str]]:
        match node:
            case ast.ImportFrom(module=str(module)) if module.split(".")[0] == "megatron":
                parts = (*module.split("."), *(alias.name for alias in node.names))
                yield from ((node.lineno, part) for part in parts if part.startswith("_") and not part.endswith("__"))
            case ast.ClassDef():
                inherits = any(root(base) in hooked for base in node.bases)
            case ast.FunctionDef(name=name) if inherits and name in private:
                yield node.lineno, name
            case ast.Attribute(attr=name):
                own = root(node.value) in ("self", "cls") and isinstance(node.value, ast.Name) and not inherits
                if name in private and not own:
                    yield node.lineno, name
                if isinstance(node.ctx, ast.Store | ast.Del) and root(node) in imported:
                    yield node.lineno, ast.unparse(node)
            case ast.Call(func=ast.Name(id="getattr" | "setattr" | "hasattr" | "delattr" as function)):
                match node.args[1:2]:
                    case [ast.Constant(value=str(name))] if name in private:
                        yield node.lineno, name
                if function in ("setattr", "delattr") and root(node.args[0]) in imported:
                    yield node.lineno, ast.unparse(node)
        for child in ast.iter_child_nodes(node):
            yield from visit(child, inherits)

    yield from visit(tree, False)


def test_they_stand_in_one_file() -> None:
    found = [
        f"{path.relative_to(PACKAGE)}:{line}: {what}"
        for path in sorted(PACKAGE.rglob("*.py"))
        if path.relative_to(PACKAGE).as_posix() != HOME
        for line, what in uses(path.read_text(encoding="utf-8"))
    ]
    assert not found, f"private names of Megatron-Core outside {HOME}:\n" + "\n".join(found)


def test_the_table_has_every_one_that_its_file_uses() -> None:
    named = {path.rpartition(".")[2] for name in NAMES for path in name.paths}
    used = {what for _, what in uses((PACKAGE / HOME).read_text(encoding="utf-8"))}
    assert {"_postprocess", "_forward_attention"} <= used
    assert used <= named, f"{HOME} uses names that are not in its table: {used - named}"


PLANTED = {
    "import": "from megatron.core.tensor_parallel.random import _get_cuda_rng_state",
    "module": "from megatron.core import _rank_utils",
    "attribute": "from megatron.core.tensor_parallel import layers\nif layers._grad_accum_fusion_available: pass",
    "method": "import megatron.core\ndef f(optimizer, p): return optimizer._get_model_param_range_map(p)",
    "getattr": "import megatron.core\ndef f(optimizer): return getattr(optimizer, '_get_model_param_range_map')",
    "override": "from megatron.core.models.gpt import GPTModel\nclass A(GPTModel):\n    def _postprocess(self): pass",
    "own_base": "from steerlm_megatron.runtime.mcore_private import HookedGPTModel\n"
    "class A(HookedGPTModel):\n    def f(self): self._is_in_embd_group = None",
    "patch": "from megatron.core import utils\nutils.torch = None",
    "setattr": "from megatron.core import utils\ndef f(name): setattr(utils, name, None)",
}


@pytest.mark.parametrize("source", PLANTED.values(), ids=PLANTED)
def test_a_planted_use_is_found(source: str) -> None:
    assert list(uses(source))


def test_names_of_our_own_may_be_private() -> None:
    source = "from megatron.core import utils\nclass A:\n    def _postprocess(self): return self._postprocess()"
    assert not list(uses(source))
