"""Predictions for the images of a release, by any timm classifier, here or by tasks."""
