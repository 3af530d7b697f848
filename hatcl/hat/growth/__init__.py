"""More units for a network that is full."""
