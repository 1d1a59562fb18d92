"""What trained networks look like: sparsity, activations, statistics, plots."""
