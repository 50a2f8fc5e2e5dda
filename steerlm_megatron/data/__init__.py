"""Records become shards, shards become batches.

``text`` turns text into ids; ``write`` makes shards of records; ``shards.py`` is the format of a shard folder, and
``views.py`` says which tokens of a stored conversation a task sees and learns; ``feed`` packs and deals samples to
steps and ranks, as the tensors of ``batch.py``.
"""
