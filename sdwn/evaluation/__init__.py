"""Predictions become an evaluation: metrics, groups, scores, the class map, record and tables."""
