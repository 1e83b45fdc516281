"""Reports of evaluations: pages, and figures for print."""
