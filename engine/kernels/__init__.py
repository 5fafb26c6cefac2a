"""Room for Triton kernels, and the only place where Triton may be imported.

A kernel here implements one method of `engine.backend.Backend` and is tested against that method of
`engine.backend.TorchBackend`, its twin and specification. Nothing outside this package imports a kernel
directly; `engine.load` chooses the backend once, by device.
"""
