"""What a GPU may do in one kernel where torch takes several: routing, and rows to experts and back.

Each kernel is written in Triton and has a twin in pure torch, of the same name and signature, which says what it
means: `permute` and `permute_triton`, `route` and `route_triton`. The Triton ones are optional, see
`moe_plugin.kernels.choice`; only their files import Triton.
"""
