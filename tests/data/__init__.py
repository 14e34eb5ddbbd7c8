"""Frozen artefacts, and how they were made."""

from pathlib import Path

TINY = Path(__file__).parent / "tiny"
"""A dataset (`data`), a bundle (`bundle`) and a result (`result`) of twelve users."""
