"""Skills: which units of an adapter a task needs, scored, localised and consolidated task after task."""
