"""A release becomes predictions: by any timm classifier, on this machine or by tasks."""
