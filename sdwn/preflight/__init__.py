"""Checks and trials before a run: of the run itself, the site and its nodes."""
