"""Checkpoints of strangers run no code: what is a pickle in them is read as plain data, or refused.

Owns: which classes a checkpoint's index (``.metadata``) may name, and that objects beside tensors are loaded with
torch's ``weights_only``. Does not own: reading (``sharded.py``, torch and Megatron-Core below it).
Invariant: once this module is imported, torch's checkpoint reader finds this module's ``load`` where it looks for
``pickle.load``, and ``weights_only=True`` where it asks for anything else, whoever calls it.
"""

from __future__ import annotations

import os
import pickle
import types
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

import torch
from torch.distributed.checkpoint import CheckpointException, default_planner, filesystem

from steerlm_megatron.errors import UserError

_METADATA = "torch.distributed.checkpoint.metadata"
_PLANNER = "torch.distributed.checkpoint.planner"
_FILESYSTEM = "torch.distributed.checkpoint.filesystem"
_FORCE = "TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD"  # torch's variable that makes its default for common.pt unsafe
# Constructors of these store their arguments and do nothing else.
_ALLOWED = frozenset(
    {
        ("torch", "Size"),
        ("torch.serialization", "_get_layout"),  # looks a memory layout up by its name
        ("collections", "OrderedDict"),
        ("pathlib", "PosixPath"),
        ("pathlib", "PurePosixPath"),
        (_FILESYSTEM, "_StorageInfo"),
        (_FILESYSTEM, "_StoragePrefix"),
        *((_METADATA, name) for name in (
            "BytesStorageMetadata", "ChunkStorageMetadata", "Metadata", "MetadataIndex", "StorageMeta",
            "TensorProperties", "TensorStorageMetadata", "_MEM_FORMAT_ENCODING",
        )),
        *((_PLANNER, name) for name in (
            "BytesIOWriteData", "SavePlan", "TensorWriteData", "WriteItem", "WriteItemType",
        )),
    }
)  # fmt: skip


class UnsafeCheckpoint(pickle.UnpicklingError):
    """A pickle in a checkpoint asks for something that plain data does not need."""


class _Unpickler(pickle.Unpickler):
    """Finds the classes of an index, and nothing else."""

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) in _ALLOWED or (module == "torch" and isinstance(getattr(torch, name, None), torch.dtype)):
            return super().find_class(module, name)
        raise UnsafeCheckpoint(
            f"its pickle asks for {module}.{name}, which could run code: no checkpoint of this program does"
        )

    def persistent_load(self, pid: Any) -> Any:
        raise UnsafeCheckpoint("its pickle refers to objects outside of it: no checkpoint of this program does")


def load(file: IO[bytes]) -> Any:
    """``pickle.load`` for a checkpoint's index.

    Raises:
        UnsafeCheckpoint: it names a class or function that an index does not have; nothing of it was called.
    """
    return _Unpickler(file).load()


@contextmanager
def reading(folder: Path) -> Iterator[None]:
    """Inside, a pickle of ``folder`` that is unsafe or damaged is a UserError that names the file or folder."""
    index = folder / ".metadata"
    try:
        with open(index, "rb") as file:
            load(file)
    except FileNotFoundError:
        pass  # whoever reads it next says so
    except UnsafeCheckpoint as error:
        raise UserError(f"{index}: {error}; do not use this checkpoint, and ask where it comes from") from None
    except Exception as error:  # a damaged pickle raises anything
        why = f"{type(error).__name__}: {error}"
        raise UserError(f"{index}: cannot be read ({why}); the checkpoint is damaged") from None
    forced = os.environ.pop(_FORCE, None)
    try:
        yield
    except pickle.UnpicklingError as error:
        raise _unsafe(folder, error) from None
    except CheckpointException as error:  # what ranks met, gathered by torch
        for failure, _ in error.failures.values():
            if isinstance(failure, pickle.UnpicklingError):
                raise _unsafe(folder, failure) from None
        raise
    finally:
        if forced is not None:
            os.environ[_FORCE] = forced


def _unsafe(folder: Path, error: BaseException) -> UserError:
    reason = " ".join(str(error).split())
    return UserError(
        f"{folder}: an object in it is no plain data ({reason[:200]}…); do not use this checkpoint, and ask where it "
        "comes from"
    )


class _SafeModule(types.ModuleType):
    """Another module as one module sees it, with ``load`` in the place of its own."""

    def __init__(self, module: types.ModuleType, load: Any) -> None:
        super().__init__(module.__name__)
        self._module, self.load = module, load

    def __getattr__(self, name: str) -> Any:
        return getattr(self._module, name)


def _load_plain(*args: Any, **kwargs: Any) -> Any:
    return torch.load(*args, **{**kwargs, "weights_only": True})


def _install() -> None:
    # torch has no setting for either: the index is unpickled, objects are loaded with weights_only=False.
    vars(filesystem)["pickle"] = _SafeModule(pickle, load)
    vars(default_planner)["torch"] = _SafeModule(torch, _load_plain)


_install()
