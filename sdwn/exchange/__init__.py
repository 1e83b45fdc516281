"""Datasets in the layouts of other libraries: written from releases, and read into them."""
