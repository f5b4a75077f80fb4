"""How checkpoints lie on disk: the files, the manifest, and the two conventions for quantized weights."""
