"""`chunkc build --target`: an emitted package's kernels, compiled for a GPU that need not be present."""
