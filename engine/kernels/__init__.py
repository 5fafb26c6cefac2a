"""Triton kernels, and the only place where Triton may be imported.

Each module holds one kernel or a pair, its launcher, and beside it `<launcher>_twin`: the same contract in plain torch,
which is the specification and what the tests compare with. Nothing outside this package imports a kernel; `engine.load`
chooses the backend once, by device. Launchers check shapes and layouts (`ValueError`), never values: page tables,
slots and ids that leave their tensors are the caller's mistake and corrupt memory on a GPU.

No launcher waits for the device or reads from it. Those marked "graph-safe" also launch the same grid whatever the
values in their tensors are, so they may be captured in a CUDA graph and replayed with other contents.

Every result for a row depends on that row alone, to the last bit: which rows share a launch never changes the order
of a sum.

Letters, for all modules:

    T   tokens of a step                    Hq   query heads
    B   rows (sequences) of a launch        Hkv  key/value heads
    R   rows that sample                    G    Hq / Hkv, query heads that share one key head
    V   vocabulary size                     D    head_dim
    E   hidden size                         N    pages in the pool
    I   intermediate size                   P    page size in tokens
    L   layers                              n    columns of a page table
    M   rows of a matrix                    K    columns of a matrix
    C   items of a work plan                W    programs that share them

A `layer` is `[N, 2, Hkv, P, D]`: one layer's share of the pool, `pool[:, index]`, so its pages are strided and each
head's `[P, D]` is contiguous. A `page_table` row names a sequence's pages in order; a slot is `page_id * P + offset`.
"""
