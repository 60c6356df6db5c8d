/* The dtypes of safetensors 0.8, in the order of fst_dtype: name, bits, DLPack code, lanes.
 * One list for host and kernels: include it and expand FST_DTYPE_LIST(X). */
#ifndef FST_DTYPE_LIST_H
#define FST_DTYPE_LIST_H

/* DLPack codes: int 0, uint 1, float 2, bfloat 4, complex 5, bool 6, float8_e4m3fn 10, e4m3fnuz 11,
 * e5m2 12, e5m2fnuz 13, e8m0fnu 14, float6_e2m3fn 15, e3m2fn 16, float4_e2m1fn 17 (dlpack.h 1.1). */
#define FST_DTYPE_LIST(X)      \
    X(BOOL, 8, 6)              \
    X(F4, 4, 17)               \
    X(F6_E2M3, 6, 15)          \
    X(F6_E3M2, 6, 16)          \
    X(U8, 8, 1)                \
    X(I8, 8, 0)                \
    X(F8_E5M2, 8, 12)          \
    X(F8_E4M3, 8, 10)          \
    X(F8_E8M0, 8, 14)          \
    X(F8_E4M3FNUZ, 8, 11)      \
    X(F8_E5M2FNUZ, 8, 13)      \
    X(I16, 16, 0)              \
    X(U16, 16, 1)              \
    X(F16, 16, 2)              \
    X(BF16, 16, 4)             \
    X(I32, 32, 0)              \
    X(U32, 32, 1)              \
    X(F32, 32, 2)              \
    X(C64, 64, 5)              \
    X(F64, 64, 2)              \
    X(I64, 64, 0)              \
    X(U64, 64, 1)

#endif
