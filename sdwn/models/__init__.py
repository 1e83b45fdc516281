"""Models: their weights, where these are and which they are, and loading pipelines."""
