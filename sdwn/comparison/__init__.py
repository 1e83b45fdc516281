"""Evaluations side by side: what follows, a page, and figures for print."""
