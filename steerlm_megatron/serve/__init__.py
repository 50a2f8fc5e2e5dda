"""Everything about HTTP: the server over a generator, OpenAI's request and response bodies, and a client of servers.

``read_request.py`` reads a request, ``api.py`` and ``service.py`` interpret it, ``generate`` draws the response in the
thread of ``engine_loop.py``, and ``server.py`` sends it.
"""
