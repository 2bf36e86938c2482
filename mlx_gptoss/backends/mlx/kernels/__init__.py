"""Custom Metal kernels: each a *.metal text, a function that launches it, and the same function in plain MLX."""
