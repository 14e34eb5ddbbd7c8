"""HTTP serving: the encoder, the index and the blend of a finished evaluation."""
