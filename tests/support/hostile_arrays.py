"""``.npy`` files that are made to hurt."""

import struct


def npy(text: str, data: bytes = b"") -> bytes:
    """A file with this header."""
    padded = text.ljust(117) + "\n"
    return b"\x93NUMPY\x01\x00" + struct.pack("<H", len(padded)) + padded.encode() + data


ARRAYS = {
    "more numbers than there are": npy("{'descr': '<f2', 'fortran_order': False, 'shape': (10**6, 10**6)}"),
    "a terabyte": npy("{'descr': '<f2', 'fortran_order': False, 'shape': (1000000, 1000000)}"),
    "less than nothing": npy("{'descr': '<f2', 'fortran_order': False, 'shape': (-1, 8)}"),
    "objects": npy("{'descr': '|O', 'fortran_order': False, 'shape': (1,)}", b"\x80\x04N."),
    "objects in a field": npy("{'descr': [('a', '|O')], 'fortran_order': False, 'shape': (1,)}", b"\x80\x04N."),
    "a header of 64 KB": b"\x93NUMPY\x01\x00\xff\xff" + b"(" * 65535,
    "a header of 4 GB": b"\x93NUMPY\x02\x00\xff\xff\xff\xff{",
    "a call": npy("{'descr': __import__('os').getcwd(), 'fortran_order': False, 'shape': ()}"),
    "another format": b"\x93NUMPY\x07\x00\x00\x00",
}
