"""Compose task vectors by learned coefficients (aTLAS); docs/atlas.md has the method."""
