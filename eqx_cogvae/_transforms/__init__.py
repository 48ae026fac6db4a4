"""Transforms of functions of arrays: frame batches, streams, slices, tiles, devices."""
