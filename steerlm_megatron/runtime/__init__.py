"""Devices, process groups, signals, and the patches that make Megatron-Core run without CUDA."""

from steerlm_megatron.runtime import light_imports

light_imports.install()
