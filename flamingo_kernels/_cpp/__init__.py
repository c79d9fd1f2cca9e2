"""The native CPU library: loaded once, on first use, through ctypes.

Importing this package loads nothing. The structs mirror the headers in ``csrc/include``;
``library.ABI_VERSION`` ties the two together. Arguments are not checked here: the ops do that.
"""
