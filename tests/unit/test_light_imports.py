"""Megatron-Core and DeepSpeed are imported without what most commands never use, and compute what they computed."""

from __future__ import annotations

import subprocess
import sys
from typing import Any

import pytest
import torch

from steerlm_megatron.runtime import light_imports
from steerlm_megatron.runtime.light_imports import compile_at_first_call

HEAVY = ("torch._inductor.compile_fx", "torch._dynamo", "networkx", "wandb", "torch.utils.tensorboard", "mlflow")


@pytest.mark.parametrize("module", ["model.norm", "train.schedule"])
def test_a_part_loads_no_compiler_and_no_loggers(module: str) -> None:
    code = f"""
import sys, steerlm_megatron.{module}, torch, megatron.core, importlib.util
assert "megatron.core.fusions.fused_bias_geglu" in sys.modules and torch.compile.__module__ == "torch"
import deepspeed, deepspeed.runtime.zero.muon.original_muon
print("loaded:", *(name for name in {HEAVY} if name in sys.modules))
assert importlib.util.find_spec("torch.utils.tensorboard"), "who asks for it gets it"
"""
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", code], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == "loaded:"


class Compiler:
    """Stands for ``torch.compile``: counts what it compiled, and with which options."""

    def __init__(self) -> None:
        self.asked: list[tuple[str, dict[str, Any]]] = []

    def __call__(self, function: Any, **options: Any) -> Any:
        self.asked.append((function.__name__, options))
        return lambda *args: ("compiled", function(*args))


def test_a_function_is_compiled_once_and_when_it_is_called() -> None:
    compiler = Compiler()

    def double(x: int) -> int:
        """Twice as much."""
        return 2 * x

    plain = compile_at_first_call(compiler, double)
    configured = compile_at_first_call(compiler, dynamic=True)(double)
    assert plain.__name__ == "double" and plain.__doc__ == "Twice as much." and compiler.asked == []
    assert plain(2) == plain(2) == ("compiled", 4) and compiler.asked == [("double", {})]
    assert configured(3) == ("compiled", 6) and compiler.asked[1:] == [("double", {"dynamic": True})]


def test_inside_a_function_that_is_compiled_the_plain_one_is_seen() -> None:
    compiler = Compiler()
    inner = compile_at_first_call(compiler, lambda x: x + 1)
    outer = torch.compile(lambda x: 2 * inner(x), backend="eager", fullgraph=True)
    assert outer(torch.ones(2)).tolist() == [4.0, 4.0] and compiler.asked == []


def test_it_is_not_installed_twice() -> None:
    before = list(sys.meta_path)
    light_imports.install()
    assert sys.meta_path == before
