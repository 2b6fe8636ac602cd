"""Triton kernels, each beside its plain definition, and the torch operators made of them.

Rooms: `repulsion` (bandwidths, kernel matrix and gradient across particles), `norm` (GroupNorm+SiLU and the upsampling
interleave, channels last), `step` (noise, Adam). `aot` compiles them to cubins.
"""
