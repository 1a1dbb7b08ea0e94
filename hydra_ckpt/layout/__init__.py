"""Pure arithmetic: tensor specs to files and byte offsets, shards to byte ranges.

Nothing here does I/O, talks to other ranks, or imports torch. Sizes and offsets are bytes unless a name says
elements; shapes, offsets and sizes of boxes are elements.
"""
