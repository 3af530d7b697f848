"""Training without a method: the loop, its state, its folder, its schedule, its measures."""
