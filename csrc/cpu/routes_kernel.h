// Where a gradient goes through relu and a 2x2 max pool: one byte a unit of z.
#pragma once
#include <cstdint>

#include "../params.h"
#include "isa.h"

// routes_row: the bytes of row n of a (N, H, W, C); 1 where relu passes a gradient, of a pooled
// window its arg-max in row-major order, or kBlocked.
// along_row: da of row n from dz and the bytes.
FF_ISA_DECLARE(
    void routes_row(const RoutesParams& p, int64_t n);
    void along_row(const RoutesParams& p, int64_t n))
