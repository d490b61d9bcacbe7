"""What to change in a snapshot so that a host takes it."""
