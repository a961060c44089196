"""With TRITON_INTERPRET=1 the Triton kernels run on CPU tensors, in the repaired interpreter."""

import os

if os.environ.get("TRITON_INTERPRET") == "1":
    import interpreter

    interpreter.install()
