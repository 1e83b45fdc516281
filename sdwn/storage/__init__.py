"""How images are kept: encoded, in HDF5, with a record each."""
