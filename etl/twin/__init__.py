"""A Tenrec-shaped log from a known process, so that one can say how good a model could be."""
