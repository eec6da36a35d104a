"""Files: written whole or not at all, hashed, checked, and read from strangers without running anything."""
