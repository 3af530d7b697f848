"""Rooms in which other libraries are met."""
