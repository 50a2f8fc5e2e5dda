"""How Megatron-Core and DeepSpeed are imported: without the compiler and the loggers that most commands never use.

Owns: one finder of ``sys.meta_path``, which sees the first import of these libraries, wherever it is. Does not own:
patches of what is imported (``mcore_compat.py``). Invariant: this file imports nothing but the standard library, and
the libraries compute what they would compute without it.

Importing Megatron-Core 0.16.1 takes 6.5 seconds of CPU time in every process, and 2.3 with this file; DeepSpeed 0.19.2
takes 2.5 and 0.5, and 3 more when its first engine is made. Functions under ``@torch.compile`` (Megatron-Core's
``@jit_fuser`` is that) load TorchInductor, with networkx and the lowering of every operator, when they are *decorated*,
though they may never be called. Timers and the autotuner load W&B, TensorBoard and MLflow where these are installed,
which this project's own sinks (``observe/sinks.py``) load where they are asked for.
"""

from __future__ import annotations

import functools
import importlib.machinery
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from types import ModuleType
from typing import Any

_MODULES = ("megatron.core", "deepspeed", "deepspeed.runtime.zero.muon.original_muon")
_LOGGERS = ("wandb", "torch.utils.tensorboard", "mlflow")


def install() -> None:
    """Have the first imports of ``_MODULES`` be light ones, if they are still to come. Idempotent."""
    if not any(isinstance(finder, _Finder) for finder in sys.meta_path):
        sys.meta_path.insert(0, _Finder())


class _Finder:
    """Finds the modules of ``_MODULES`` as Python does, and has them run inside :func:`_light`."""

    def find_spec(
        self, name: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        if name not in _MODULES:
            return None
        spec = importlib.machinery.PathFinder.find_spec(name, path, target)
        if spec is not None and spec.loader is not None:
            execute = spec.loader.exec_module

            def exec_module(module: ModuleType) -> None:
                with _light():
                    execute(module)

            spec.loader.exec_module = exec_module  # type: ignore[method-assign]
        return spec


@contextmanager
def _light() -> Iterator[None]:
    """Defer ``torch.compile``, and hide the loggers that are not loaded yet, inside the ``with``."""
    import torch

    original = torch.compile
    hidden = [name for name in _LOGGERS if name not in sys.modules]
    torch.compile = functools.partial(compile_at_first_call, original)
    sys.modules.update(dict.fromkeys(hidden))  # type: ignore[arg-type]  # None makes an import fail
    try:
        yield
    finally:
        torch.compile = original
        for name in hidden:
            del sys.modules[name]


def compile_at_first_call(
    compiler: Callable[..., Any], function: Callable[..., Any] | None = None, **options: Any
) -> Any:
    """Return ``compiler(function, **options)``, computed when it is called first; without a function, a decorator.

    A function that is being compiled gets the plain ``function``, which the compiler looks into as well.
    """
    if function is None:
        return functools.partial(compile_at_first_call, compiler, **options)
    compiled: list[Callable[..., Any]] = []

    @functools.wraps(function)
    def call(*args: Any, **kwargs: Any) -> Any:
        import torch

        if torch.compiler.is_compiling():
            return function(*args, **kwargs)
        if not compiled:
            compiled.append(compiler(function, **options))
        return compiled[0](*args, **kwargs)

    return call
