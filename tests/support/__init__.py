"""What the tests share: the kernel's own figures, resources that need root, and the rule about skips.

Nothing here imports `sparsemem`: a fault in the library must not be able to hide itself from its tests.
"""
