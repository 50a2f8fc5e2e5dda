"""Devices, process groups, and what makes Megatron-Core run without CUDA."""
