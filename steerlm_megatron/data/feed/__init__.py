"""Shards → steps: samples through a view, packed into rows, blended, dealt to ranks, laid out as batches."""
