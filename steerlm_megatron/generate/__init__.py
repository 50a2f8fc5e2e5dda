"""Generate responses, many at a time, from a model in this process, without HTTP.

``generator.py`` takes requests (``protocol.py``), ``scheduler.py`` plans the steps, ``runner.py`` computes one on each
rank of a replica, ``sampling.py`` draws its tokens, ``text.py`` makes text of them.
"""
