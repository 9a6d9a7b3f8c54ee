"""The native CPU kernels; pyproject.toml says all the rest (its own key for extensions is still experimental).

They are loaded through ctypes, so neither torch nor Python's headers take part, and without a compiler the install goes on.
"""

from setuptools import Extension, setup

NAMES = (
    "gemv_avx512", "gemm_avx512", "gemm_amx_small", "gemm_amx", "int8", "attention", "elementwise", "convolution", "decode",
    "decode_avx512", "decode_portable",
)  # fmt: skip
HEADERS = ("floats", "weights", "tiles", "amx", "gemv_avx512", "int8", "decode", "decode_kernels")
native = Extension(
    "models.kernels.native",
    [f"models/kernels/{name}.cpp" for name in NAMES],
    depends=[f"models/kernels/{name}.h" for name in HEADERS],
    language="c++",
    extra_compile_args=["-O3", "-std=c++20", "-fopenmp"],
    extra_link_args=["-fopenmp"],
    optional=True,
)
setup(ext_modules=[native])
