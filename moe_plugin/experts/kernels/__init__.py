"""How the products of the experts are computed: on a CPU in blocks or batches of rows, on a GPU as grouped products.

Triton kernels may also move rows to their experts and back: `permute_triton` has the same functions as `permute`, which
defines them. Triton is optional, see `choice`; only the file named after it imports it.
"""
