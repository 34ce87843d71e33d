"""SA-1B in, teacher embeddings out: images, preprocessing, teacher, and the HDF5 cache."""
