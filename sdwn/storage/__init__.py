"""Images in files: their codecs, their columns, and the HDF5 file that holds both."""
