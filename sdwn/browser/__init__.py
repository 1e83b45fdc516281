"""Web pages of a release: search, WordNet's tree, synsets and their images."""
