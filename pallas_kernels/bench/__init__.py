"""Every kernel figure in docs/ comes from here, e.g. `python -m pallas_kernels.bench lightning --peers jla`."""
