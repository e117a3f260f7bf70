// The tables of all ops for the processor at hand.
#pragma once

#include "block_sparse_linear/table.h"
#include "dag_network/table.h"
#include "masked_linear/table.h"
#include "nm_linear/table.h"
#include "proximal/table.h"
#include "threshold_attention/table.h"

namespace compsparse {

// Chosen once from cpuid, capped by the environment variable COMPSPARSE_CPU=scalar|avx2|avx512|avx512_bf16.
struct Kernels {
  const char* isa;
  const BlockSparseTable* block_sparse;
  const MaskedTable* masked;
  const DagTable* dag;
  const AttentionTable* attention;
  const NMTable* nm;
  const ProximalTable* proximal;
};

const Kernels& kernels();

}  // namespace compsparse
