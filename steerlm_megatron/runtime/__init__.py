"""Devices, process groups, signals, and the patches that make Megatron-Core run without CUDA."""
