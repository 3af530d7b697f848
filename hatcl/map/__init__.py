"""The map of the network: units, the trace that finds them, and the grains that methods work on."""
