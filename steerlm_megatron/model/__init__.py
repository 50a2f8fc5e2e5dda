"""The model: Megatron-Core's GPT for packed rows, its heads, adapters and weights, and what it costs to compute."""

import steerlm_megatron.runtime  # noqa: F401  # it makes the import of Megatron-Core a light one
