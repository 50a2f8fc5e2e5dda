"""An untrusted checkpoint runs no code, wherever in it a pickle is; our checkpoints can be opened."""

from __future__ import annotations

import builtins
import io
import pickle
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.distributed.checkpoint import metadata as dcp

from steerlm_megatron.errors import UserError
from steerlm_megatron.train.engine_mcore import MegatronEngine
from steerlm_megatron.train.safe_pickle import UnsafeCheckpoint, load
from steerlm_megatron.train.sharded import common_state, stored_dtype
from tests.helpers.engines import Case, make, saved, step_batches

_RAN = "steerlm_hostile_code_ran"


@pytest.fixture(autouse=True)
def nothing_ran() -> Iterator[None]:
    """Check that no test of this file sets the mark that hostile code sets."""
    yield
    ran = hasattr(builtins, _RAN)
    if ran:
        delattr(builtins, _RAN)
    assert not ran, "code in a checkpoint ran"


class _Calls:
    """An object whose pickle calls a function when it is loaded."""

    def __init__(self, function: Callable[..., Any], arguments: tuple[Any, ...]) -> None:
        self.call = (function, arguments)

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[Any, ...]]:
        return self.call


_CODE = f"import builtins; builtins.{_RAN} = True"


def hostile() -> _Calls:
    return _Calls(exec, (_CODE,))


def _dangerous() -> st.SearchStrategy[tuple[str, str]]:
    """Draw modules and names that a pickle can ask for: known ways to run code, and any others."""
    known = [
        ("builtins", "exec"), ("builtins", "eval"), ("builtins", "getattr"), ("builtins", "__import__"),
        ("os", "system"), ("posix", "system"), ("subprocess", "Popen"), ("importlib", "import_module"),
        ("torch", "load"), ("torch", "hub.load"), ("torch.serialization", "load"), ("torch", "Size.__class__"),
        ("torch", "dtype"), ("torch.storage", "_load_from_bytes"), ("collections", "namedtuple"),
        ("operator", "attrgetter"), ("pathlib", "PosixPath.unlink"), ("functools", "partial"),
        ("copyreg", "_reconstructor"),
        ("torch.distributed.checkpoint.metadata", "os.system"), ("torch.distributed.checkpoint.metadata", "Enum"),
        ("torch.distributed.checkpoint.filesystem", "pickle.loads"),
        ("torch.distributed.checkpoint.planner", "io.open"),
    ]  # fmt: skip
    name = st.from_regex(r"[a-z_]{1,8}(\.[a-z_]{1,8})?", fullmatch=True)
    return st.sampled_from(known) | st.tuples(name, name)


def _asks_for(module: str, name: str, protocol: int) -> bytes:
    """Return a pickle that calls ``module.name("x")``."""
    if protocol < 4:
        return f"c{module}\n{name}\n(Vx\ntR.".encode()
    out = pickle.PROTO + bytes([protocol])
    for text in (module, name):
        out += pickle.SHORT_BINUNICODE + bytes([len(text)]) + text.encode()
    return out + pickle.STACK_GLOBAL + b"(Vx\ntR."


@given(_dangerous(), st.integers(0, 5), st.sampled_from(["alone", "in a list", "after an index"]))
def test_an_index_that_asks_for_more_than_an_index_has_is_refused(
    asked: tuple[str, str], protocol: int, where: str
) -> None:
    content = _asks_for(*asked, protocol)
    if where == "in a list":
        content = b"(" + content[:-1].removeprefix(pickle.PROTO + bytes([protocol])) + b"l."
    if where == "after an index":  # hostile code comes after a well-formed index
        good = pickle.dumps(dcp.Metadata({}), protocol=2)
        content = good[:-1] + content.removeprefix(pickle.PROTO + bytes([protocol]))
    with pytest.raises(UnsafeCheckpoint, match="which could run code"):
        load(io.BytesIO(content))


@given(
    sizes=st.lists(st.integers(0, 9), max_size=4),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.int8, torch.float8_e4m3fn, torch.bool]),
    protocol=st.integers(2, 5),
)
def test_an_index_is_read_as_it_is(sizes: list[int], dtype: torch.dtype, protocol: int) -> None:
    chunk = dcp.ChunkStorageMetadata(torch.Size([0] * len(sizes)), torch.Size(sizes))
    tensor = dcp.TensorStorageMetadata(dcp.TensorProperties(dtype), torch.Size(sizes), [chunk])
    index = dcp.Metadata({"w": tensor, "o": dcp.BytesStorageMetadata()}, storage_meta=dcp.StorageMeta("somewhere"))
    assert load(io.BytesIO(pickle.dumps(index, protocol=protocol))) == index


@pytest.fixture(scope="module")
def engine() -> MegatronEngine:
    trained = make(Case("sft"))
    trained.train_step(step_batches(0))
    return trained


@pytest.fixture(scope="module")
def whole(engine: MegatronEngine, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Save a checkpoint as a run does."""
    return saved(engine, tmp_path_factory.mktemp("checkpoint") / "whole")


@pytest.fixture
def copy(whole: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(whole, tmp_path / "copy"))


def _readers(engine: MegatronEngine) -> list[Callable[[Path], Any]]:
    return [engine.load, engine.load_model, common_state, lambda folder: stored_dtype(folder, "decoder")]


def test_a_checkpoint_of_ours_loads(engine: MegatronEngine, copy: Path) -> None:
    for read in _readers(engine):
        read(copy)


@pytest.mark.parametrize("reader", range(4), ids=["resume", "init_from", "common", "dtype"])
def test_code_in_the_index_does_not_run(engine: MegatronEngine, copy: Path, reader: int) -> None:
    (copy / ".metadata").write_bytes(pickle.dumps(hostile()))
    with pytest.raises(UserError, match=r"\.metadata: its pickle asks for builtins\.exec.*do not use this checkpoint"):
        _readers(engine)[reader](copy)


def test_code_in_an_object_beside_the_tensors_does_not_run(engine: MegatronEngine, copy: Path) -> None:
    """Objects such as generators' states are pickles inside the files of tensors."""
    index = pickle.loads((copy / ".metadata").read_bytes())
    objects = [k for k, v in index.state_dict_metadata.items() if isinstance(v, dcp.BytesStorageMetadata)]
    assert any(name.startswith("rng") for name in objects)
    for place, stored in index.storage_data.items():
        if place.fqn in objects:
            with open(copy / stored.relative_path, "r+b") as file:
                start = file.seek(0, io.SEEK_END)
                torch.save([hostile()], file)
                stored.offset, stored.length = start, file.tell() - start
    (copy / ".metadata").write_bytes(pickle.dumps(index))
    with pytest.raises(UserError, match=r"copy: an object in it is no plain data .*do not use this checkpoint"):
        engine.load(copy)


@pytest.mark.parametrize("forced", ["0", "1"])
def test_code_in_the_common_state_does_not_run(
    engine: MegatronEngine, copy: Path, forced: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """This holds even if the environment tells torch to load any pickle."""
    monkeypatch.setenv("TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD", forced)
    torch.save({"layout": hostile()}, copy / "common.pt")
    with pytest.raises(UserError, match="no plain data"):
        common_state(copy)


@given(st.binary(max_size=200), st.integers(0, 2000))
def test_a_damaged_index_is_a_user_error(noise: bytes, at: int) -> None:
    """Any bytes give an index or an error, and nothing else."""
    good = pickle.dumps(dcp.Metadata({"w": dcp.BytesStorageMetadata()}))
    at %= len(good)
    try:
        load(io.BytesIO(good[:at] + noise + good[at:]))
    except Exception as error:
        assert not isinstance(error, SystemExit | KeyboardInterrupt)
