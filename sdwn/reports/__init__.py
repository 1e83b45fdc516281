"""An evaluation becomes a page and figures for print."""
