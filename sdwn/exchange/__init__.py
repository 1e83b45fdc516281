"""Export of releases to the layouts of other libraries, and import from them."""
