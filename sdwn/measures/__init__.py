"""Measures of a release's images by their features: likeness, variety, copies, use for training."""
