"""How the products of the experts are computed: on a CPU in blocks or batches of rows, on a GPU as grouped products.

Moving rows to their experts and back may also run as Triton kernels: `permute_triton` has the same functions as
`permute`, which defines what they mean. Triton is optional, see `choice`; only the file named after it imports it.
"""
