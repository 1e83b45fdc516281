"""Devices: what they are, how fast, and the batch size that suits them."""
