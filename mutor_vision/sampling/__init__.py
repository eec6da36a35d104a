"""Labels -> codes -> images."""
