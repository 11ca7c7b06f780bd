"""Kernels on arrays: lightning attention and its neighbours. Knows nothing of models, configs or meshes."""
