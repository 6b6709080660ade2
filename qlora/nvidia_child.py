"""In a process of its own: asks the driver's library how it is. It may hang, or end the process.

Prints `status S cuda V cards N`: cuInit's code, the newest CUDA that the driver has, and how many cards it lists.
"""

from __future__ import annotations

import ctypes
import sys


def main() -> None:
    """`cuInit`, `cuDriverGetVersion` and `cuDeviceGetCount` of cuda.h; nothing is printed where there is no library."""
    try:
        library = ctypes.CDLL("nvcuda.dll" if sys.platform == "win32" else "libcuda.so.1")
    except OSError:
        return
    version, count = ctypes.c_int(0), ctypes.c_int(0)
    status = library.cuInit(0)
    library.cuDriverGetVersion(ctypes.byref(version))
    if status == 0:
        status = library.cuDeviceGetCount(ctypes.byref(count))
    sys.stdout.write(f"status {status} cuda {version.value} cards {count.value}\n")


if __name__ == "__main__":
    main()
