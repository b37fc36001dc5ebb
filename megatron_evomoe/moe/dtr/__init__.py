"""The Dynamic Token-aware Router: its maths, and the same maths as Triton kernels."""
