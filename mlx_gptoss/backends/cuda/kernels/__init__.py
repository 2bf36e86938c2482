"""The Triton kernels. dequant.py is how weights are read; linear.py, routing.py, moe.py,
attention.py and sample.py compute."""
