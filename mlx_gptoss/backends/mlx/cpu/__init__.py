"""What computes on a CPU without Apple's BLAS: threads that sleep when idle (pool.py), and products with matrices as
they are stored (products.py), by kernels compiled for this processor if llvmlite is installed (kernels.py, reader.py,
emit.py)."""
