"""Images from any source -> features of a network, and their moments."""
