"""Releases: made of shards, read, described, and made again."""
