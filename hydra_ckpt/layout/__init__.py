"""Pure arithmetic: tensor specs to files and byte offsets, shards to byte ranges.

Nothing here does I/O or communicates, so every rank can compute the same plan alone. The modules' docstrings follow one
tensor, `w` of 6 x 4 fp32 numbers, 16 bytes a row; tests execute these examples.
"""
