"""All that knows HTTP: the server over a generator, OpenAI's shapes, and the client of other servers.

A request comes in through ``read_request.py``, is understood by ``api.py`` and ``service.py``, drawn by ``generate`` in
the thread of ``engine_loop.py``, and goes out through ``server.py``.
"""
