"""`chunkc tune`: the schedules that kernels are fastest with on the GPU at hand."""
