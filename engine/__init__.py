"""Token ids in, token ids out: model, kernels, paged KV, schedulers, sampler."""
