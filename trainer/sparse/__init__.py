"""The item table: only the rows that a batch touches are read, updated and exchanged."""
