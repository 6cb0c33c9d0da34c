# cffi makes the module; what is in `lib` is declared in shim/shim.h.
from typing import Any

ffi: Any
lib: Any
