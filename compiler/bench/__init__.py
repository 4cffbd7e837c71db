"""`chunkc bench`: an emitted layer or op against its peers, and against what the memory and the arithmetic allow."""
