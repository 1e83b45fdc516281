"""A release to look through: search, WordNet's tree, synsets and their images."""
