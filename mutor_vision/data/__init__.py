"""Images and token sets: found, read, cut, and put in the order in which training sees them."""
