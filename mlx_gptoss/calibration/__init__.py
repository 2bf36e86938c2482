"""Calibrated quantization: codes, scales and biases of the least change in what the network computes."""
