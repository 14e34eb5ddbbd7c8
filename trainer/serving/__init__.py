"""Recommendations on request: the encoder, the index and the blend of a finished evaluation behind HTTP."""
