"""Releases: merging shards, reading images, the manifest and the dataset card."""
