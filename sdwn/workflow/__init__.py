"""Workflows of a whole run: plan, submit, follow, status, and the stages after its shards."""
