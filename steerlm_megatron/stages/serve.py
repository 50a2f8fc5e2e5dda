"""``serve``: run the sampling server over a trained model."""

from __future__ import annotations

import signal
from dataclasses import replace

from steerlm_megatron.config.schema import Config
from steerlm_megatron.errors import UserError
from steerlm_megatron.generate.protocol import SamplingParams
from steerlm_megatron.runtime import launcher
from steerlm_megatron.serve.server import check_port, serve
from steerlm_megatron.stages.sampling import open_generator
from steerlm_megatron.stages.session import NO_ATTRIBUTES, load_model, open_checkpoint, requested_best, session


def run(config: Config) -> None:
    """Serve ``checkpoint`` on ``server.host:server.port`` until SIGTERM or Ctrl-C. Collective over the world.

    Requests that name no level of an attribute ask for ``attributes.best`` (``requested_best``), and those that name no
    sampling parameter for ``sampling.*``.
    """
    checkpoint = str(config.checkpoint)
    SamplingParams.from_config(config.sampling)
    if launcher.global_rank() == 0 and config.server.port:
        check_port(config.server.host, config.server.port)
    with session(config) as here:
        if here.layout.dp_size > 1:
            raise UserError(
                f"{here.layout.dp_size} replicas (parallel.data x parallel.context): a server is one; start one "
                "server per replica, each with its own server.port, and name them all in server.urls"
            )
        schema = open_checkpoint(checkpoint, "checkpoint", head="lm").conditioned_on
        best = requested_best(config, schema or NO_ATTRIBUTES)  # checked before weights are read
        loaded = load_model(checkpoint, config, "checkpoint", head="lm", gather_logits=True)
        if schema is not None:
            schema = replace(schema, best=best)
        generator = open_generator(config, loaded, config.server.max_queue)
        if not here.layout.is_main:
            # A launcher signals every rank. The main rank finishes running requests and then stops the others.
            for number in (signal.SIGTERM, signal.SIGINT):
                signal.signal(number, signal.SIG_IGN)
        serve(generator, schema, config.server, config.sampling)
