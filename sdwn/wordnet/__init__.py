"""WordNet and what is taken of it: synsets, catalogs, ImageNet's classes."""
