"""A release becomes predictions, predictions an evaluation, and an evaluation a report."""
