"""Other libraries' layers on pyflowgen's kernels; what :func:`pyflowgen.accelerate` puts in their classes' place.

None of those libraries is imported: a class here is mixed into one of theirs and changes how, not what, it computes.
"""
