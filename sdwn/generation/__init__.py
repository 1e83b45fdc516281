"""Making images: the prompts of a shard through a pipeline, finished ones kept at every moment."""
