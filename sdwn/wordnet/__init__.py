"""WordNet: its corpus, the taxonomy of a run, catalogs, ImageNet's classes."""
