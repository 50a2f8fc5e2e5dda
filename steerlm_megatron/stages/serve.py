"""``serve``: the sampling server over a trained model."""

from __future__ import annotations

import signal

from steerlm_megatron.config.schema import Config
from steerlm_megatron.errors import UserError
from steerlm_megatron.generate.server import check_port, serve
from steerlm_megatron.runtime import launcher
from steerlm_megatron.stages.sampling import open_generator
from steerlm_megatron.stages.session import load_model, session


def run(config: Config) -> None:
    """Serve ``checkpoint`` on ``server.host:server.port`` until SIGTERM or Ctrl-C. Collective over the world."""
    if config.checkpoint is None:
        raise UserError("checkpoint is not set: name the run folder of train_sft to serve")
    if launcher.global_rank() == 0 and config.server.port:
        check_port(config.server.host, config.server.port)
    with session(config) as here:
        if here.layout.dp_size > 1:
            raise UserError(
                f"{here.layout.dp_size} replicas (parallel.data x parallel.context): a server is one; start one "
                "server per replica, each with its own server.port, and name them all in server.urls"
            )
        loaded = load_model(config.checkpoint, config, "checkpoint", head="lm", gather_logits=True)
        generator = open_generator(config, loaded)
        schema = loaded.schema if loaded.meta.conditioned else None
        if not here.layout.is_main:
            # A launcher signals every rank; the main one finishes what is running and then stops the others.
            for number in (signal.SIGTERM, signal.SIGINT):
                signal.signal(number, signal.SIG_IGN)
        serve(generator, schema, config.server, config.sampling)
