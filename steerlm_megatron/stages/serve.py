"""``serve``: run the sampling server over a trained model."""

from __future__ import annotations

import atexit
import os
import signal
import socket
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path

from steerlm_megatron.config.schema import Config, ServerConfig
from steerlm_megatron.errors import UserError
from steerlm_megatron.files import write_text_atomic
from steerlm_megatron.generate.protocol import EngineDead, SamplingParams
from steerlm_megatron.observe.cost import CostMeter
from steerlm_megatron.runtime import launcher
from steerlm_megatron.serve.orderly import check_server
from steerlm_megatron.serve.scoring import TakingTurns
from steerlm_megatron.serve.server import Running, serve
from steerlm_megatron.stages.sampling import (
    ADDRESS,
    count_response,
    count_shared,
    identity,
    open_drawing,
    open_engine,
)
from steerlm_megatron.stages.scoring import Scorer
from steerlm_megatron.stages.session import (
    NO_ATTRIBUTES,
    load_model,
    open_checkpoint,
    requested_best,
    session,
)


def run(config: Config) -> None:
    """Serve ``checkpoint`` on ``server.host:server.port`` until SIGTERM or Ctrl-C. Collective over the world.

    Requests that name no level of an attribute ask for ``attributes.best`` (``requested_best``), and those that name no
    sampling parameter for ``sampling.*``.
    """
    checkpoint = str(config.checkpoint)
    SamplingParams.from_config(config.sampling)
    if launcher.global_rank() == 0:
        check_server(config.server)
    with session(config) as here:
        if here.layout.dp_size > 1:
            raise UserError(
                f"{here.layout.dp_size} replicas (parallel.data x parallel.context): a server is one; start one "
                "server per replica, each with its own server.port, and name them all in server.urls"
            )
        schema = open_checkpoint(checkpoint, "checkpoint", head="lm").conditioned_on
        best = requested_best(config, schema or NO_ATTRIBUTES)  # checked before weights are read
        loaded = open_drawing(config)
        if schema is not None:
            schema = replace(schema, best=best)
        own = open_scorer(config, here.cost)
        engine = open_engine(here, loaded, config.server.max_queue)
        scorer = own if own is None or engine.group.size == 1 else TakingTurns(own, engine)
        engine.on_result = lambda result: count_response(here.cost, result, loaded)
        if not here.layout.is_main:
            # A launcher signals every rank. The main rank finishes running requests and then stops the others.
            for number in (signal.SIGTERM, signal.SIGINT):
                signal.signal(number, signal.SIG_IGN)
        timeout_sec = config.engine.timeout_sec
        try:
            with here.cost.work(), announced(config.server) as ready:
                serve(
                    engine, schema, config.server, config.sampling, ready, timeout_sec=timeout_sec,
                    identity=identity(loaded), scorer=scorer,
                )  # fmt: skip
        except EngineDead:
            if here.layout.world_size > 1:
                _leave_at_once()
            raise
        finally:
            count_shared(here.cost, engine.shared_prompt_tokens, loaded)
            if engine.group.is_leader:
                engine.close()
        # A server that was stopped is not complete: the same command starts it again.
        here.run.finish("interrupted")


def _leave_at_once() -> None:
    """End this process with exit code 1 as soon as Python has said why: a thread may wait below Python for a rank that
    does not answer, and tearing that wait down could last as long as the wait.
    """

    def leave() -> None:
        for stream in (sys.stdout, sys.stderr):
            with suppress(OSError, ValueError):  # the stream is closed, or its reader has gone
                stream.flush()
        os._exit(1)

    atexit.register(leave)


def open_scorer(config: Config, cost: CostMeter | None = None) -> Scorer | None:
    """Return what answers ``/v1/score``, if ``ap_checkpoint`` names a model for it. Collective over the world."""
    if config.ap_checkpoint is None:
        return None
    ap = load_model(config.ap_checkpoint, config, "ap_checkpoint", head="ap")
    return Scorer(ap, config.scoring.batch_tokens, config.scoring.decode, cost)


@contextmanager
def announced(server: ServerConfig) -> Iterator[Callable[[Running], None]]:
    """Yield what is to be called when the server listens: it writes the address into ``server.folder``, if that is set,
    from where it is removed in the end. A server that listens on all addresses is reached by the host's name.
    """
    written: list[Path] = []

    def ready(running: Running) -> None:
        if server.folder is None:
            return
        address = running.url
        for anything in ("//0.0.0.0:", "//[::]:"):
            address = address.replace(anything, f"//{socket.gethostname()}:")
        written.append(Path(server.folder) / f"{address.rpartition('/')[2].replace(':', '-')}{ADDRESS}")
        write_text_atomic(written[0], f"{address}\n")

    try:
        yield ready
    finally:
        for path in written:
            path.unlink(missing_ok=True)
