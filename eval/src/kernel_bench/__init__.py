"""Measuring the operations of `vtc.kernels`: `python -m vtc.eval.kernel_bench`."""
