"""A whole run: submitting it, following it, its status, and the stages behind its shards."""
