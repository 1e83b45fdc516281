"""A run beyond its tasks: what it needs first, how it stands, what follows, what came out."""
