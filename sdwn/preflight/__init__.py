"""Examining a run, a site and its nodes before the run."""
