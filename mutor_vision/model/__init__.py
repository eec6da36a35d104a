"""The transformer, its attention, caches and adapters. Nothing here knows offsets or losses."""
