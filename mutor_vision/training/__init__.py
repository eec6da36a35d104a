"""The training of the transformer: loop, step, optimizer, sharding, validation, and what it costs."""
