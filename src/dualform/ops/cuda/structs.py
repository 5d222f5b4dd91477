"""The structures of the CUDA sources: their fields in order, checked against the headers by a test."""

from dualform.ops.structs import INT64, POINTER, Structure

# A tensor (B, T, ...) whose axes after time are contiguous, or (B, D, T).
VIEW = Structure("View", (POINTER, "data"), (INT64, "row time"), of=lambda x: (x.data_ptr(), x.stride(0), x.stride(1)))

CONV = Structure(
    "Conv",
    (INT64, "rows length width span"),
    (POINTER, "borders ids"),
    (VIEW, "x"),
    (POINTER, "weight bias state y final"),
    (VIEW, "dy"),
    (POINTER, "dfinal dx dstate"),
    (INT64, "blocks"),
    (POINTER, "sums dweight dbias"),
)

SYSTEM = Structure(
    "System",
    (INT64, "rows length width modes span"),
    (POINTER, "borders"),
    (VIEW, "u"),
    (POINTER, "a c h0 carry y final"),
    (VIEW, "dy"),
    (POINTER, "dfinal carry_q du da dc dh0"),
)

SCAN = Structure(
    "Scan",
    (INT64, "rows length width states groups_b groups_c"),
    (POINTER, "borders"),
    (VIEW, "u delta z b c"),
    (POINTER, "a d bias h0 y final saved"),
    (INT64, "lead span"),
    (VIEW, "dy"),
    (POINTER, "dfinal carry seconds du ddelta dz dmaps da dd dbias db dc dh0"),
    (INT64, "spans"),
    (POINTER, "sums_of_maps[2] sums[5]"),
)
