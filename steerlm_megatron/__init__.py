"""SteerLM (arXiv 2310.05344) on Megatron-Core: attribute prediction, annotation, attribute-conditioned SFT, bootstrapping."""

__version__ = "0.1.0"
