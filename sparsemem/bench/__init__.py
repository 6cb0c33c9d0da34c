"""Measures sparsemem against bare system calls and others, side by side in one process.

`catalogue` lists the cases, `lab` runs them, `targets` says what should come
out, `outcome` puts it together.  A user of the library, not a part of it: it is
loaded by `sparsemem bench` alone, and makes system calls of its own.
"""
