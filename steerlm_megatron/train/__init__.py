"""Training: engines, their optimizers, objectives, and checkpoints."""

import steerlm_megatron.runtime  # noqa: F401  # it makes the import of Megatron-Core a light one
