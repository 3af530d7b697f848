"""Growing: more units for a full network."""
