"""Models: where their weights lie, which they are, and loading them."""
