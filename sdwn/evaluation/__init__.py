"""Predictions become an evaluation: figures, tables, and the places of a map."""
