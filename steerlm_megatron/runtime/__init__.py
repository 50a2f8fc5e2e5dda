"""Devices, process groups, and what makes Megatron-Core run without CUDA."""

import warnings

# Megatron-Core warns once per module that Apex and Transformer Engine are absent. Here that is the normal case (DESIGN §2), and the
# modules that would need them are replaced; nothing a user could act on.
warnings.filterwarnings("ignore", category=UserWarning, module=r"megatron\..*")
warnings.filterwarnings("ignore", category=FutureWarning, module=r"megatron\..*")
warnings.filterwarnings("ignore", category=DeprecationWarning, module=r"megatron\..*")
