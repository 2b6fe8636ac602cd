"""Triton kernels, each beside its plain definition, and the torch operators made of them.

Rooms: `repulsion` (bandwidths, kernel matrix and gradient across particles), `norm` (GroupNorm+SiLU and the upsampling
interleave, channels last; rows of transformers), `narrow` (3x3 convolutions with few channels on one side), `step`
(noise, Adam). `aot` compiles them to cubins.
"""
