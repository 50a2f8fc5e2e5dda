"""From shards to steps: samples through a view are packed into rows, blended, distributed to ranks and batched."""
