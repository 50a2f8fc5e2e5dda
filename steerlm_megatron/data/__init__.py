"""From records to shards, and from shards to batches.

``text`` turns text into ids; ``write`` makes shards of records; ``shards.py`` has the format of a shard folder, and
``views.py`` says which tokens of a stored conversation a task sees and learns; ``feed`` packs samples and distributes
them to steps and ranks, as the tensors of ``batch.py``.
"""
