"""Evaluations of predictions: metrics, groups, scores, the class map, record and tables."""
