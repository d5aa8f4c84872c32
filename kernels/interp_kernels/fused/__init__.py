"""Fused attention kernels in Triton: CUDA, or any CPU under TRITON_INTERPRET=1."""
