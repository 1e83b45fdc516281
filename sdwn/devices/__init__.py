"""Devices: GPUs and CPUs, their memory and speed, and the best batch size."""
