"""Models: finding, checking and locking their weights, and loading pipelines."""
